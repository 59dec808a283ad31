"""Reports to the autoscaler: this worker's status and load, and how each request ended.

Whatever could not be delivered is included in the next report. No client waits for a report.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from itertools import islice

import httpx2

from api.settings.vast_variables import Identity
from api.vast.active_errors import ActiveErrors
from api.vast.workload import EndedJob, Workload

VERSION = "1.1.0"
"""Version of the protocol. The autoscaler treats a worker of another version as broken."""

_CONSOLE = "https://cloud.vast.ai/api/v0"
"""Address to which some templates report. It has no route for ended requests."""
_TICK_S = 1.0
_MAX_SILENCE_S = 10.0
"""An unchanged status is sent again after this many seconds."""
_TIMEOUT_S = 10.0
_ATTEMPTS = 3
_RETRY_PAUSE_S = 2.0
_MAX_ENDED_PER_REPORT = 1000
_FINAL_REPORT_S = 3.0
_GIB = 1 << 30

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Readiness:
    """What the worker reports once it is ready, 0 until then.

    load_s     seconds from the start of the process until it was ready
    max_perf   tokens per second in the benchmark
    is_paused  whether the engine stands still: the report is then that of a worker that loads
    """

    load_s: float = 0.0
    max_perf: float = 0.0
    is_paused: bool = False


class Reporter:
    """Sends reports while `run` runs in a task, until `close` sends the last one."""

    def __init__(
        self,
        http: httpx2.AsyncClient,
        identity: Identity,
        workload: Workload,
        errors: ActiveErrors,
        readiness: Readiness,
    ) -> None:
        self._http = http
        self._identity = identity
        self._workload = workload
        self._errors = errors
        self._readiness = readiness
        self.on_delivered: Callable[[], None] = lambda: None
        """Called when a report was delivered and taken out of the workload."""
        self._soon = asyncio.Event()
        self._is_overdue = False
        self._reported_at = float("-inf")
        self._reported_activity: tuple[object, ...] = ()
        self._reported_disk = 0.0
        errors.on_change = self.report_soon

    def report_soon(self) -> None:
        """Send a status report at once instead of at the next tick."""
        self._soon.set()

    async def run(self) -> None:
        """Report until cancelled."""
        await asyncio.gather(
            self._keep_reporting(self._report_status), self._keep_reporting(self._report_ended)
        )

    async def close(self) -> None:
        """Send what was not reported yet, in one short attempt."""
        try:
            async with asyncio.timeout(_FINAL_REPORT_S):
                await self._send_ended(attempts=1)
                await self._send_status(attempts=1)
        except TimeoutError:
            logger.warning("the last report was not delivered in time")

    async def _keep_reporting(self, report: Callable[[], Awaitable[None]]) -> None:
        """Report again and again. No exception ends this loop: the autoscaler gives up a worker
        that is silent.
        """
        while True:
            try:
                await report()
            except Exception:
                logger.exception("a report failed")
                await asyncio.sleep(_TICK_S)

    async def _report_status(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._soon.wait(), _TICK_S)
        soon = self._soon.is_set()
        self._soon.clear()
        quiet_s = time.monotonic() - self._reported_at
        is_active = self._readiness.load_s and self._reported_activity != self._activity
        if soon or self._is_overdue or is_active or quiet_s > _MAX_SILENCE_S:
            self._is_overdue = True
            await self._send_status(_ATTEMPTS)

    async def _report_ended(self) -> None:
        await asyncio.sleep(_TICK_S)
        if self._workload.ended:
            await self._send_ended(_ATTEMPTS)

    @property
    def _activity(self) -> tuple[object, ...]:
        """A value that changes whenever a request arrives, starts or ends."""
        load = self._workload.load()
        return (load.num_received, load.working, load.rejected)

    async def _send_status(self, attempts: int) -> None:
        activity, load = self._activity, self._workload.load()
        disk = await asyncio.to_thread(_disk_used)
        readiness = Readiness() if self._readiness.is_paused else self._readiness
        report = {
            "id": self._identity.container_id,
            "mtoken": self._identity.master_token.get_secret_value(),
            "version": VERSION,
            "loadtime": readiness.load_s,
            "cur_load": load.pending,
            "rej_load": load.rejected,
            "new_load": load.received,
            "error_msg": self._errors.message,
            "max_perf": readiness.max_perf,
            "cur_perf": load.served,
            "cur_capacity": 0,
            "max_capacity": 0,
            "num_requests_working": len(load.working),
            "num_requests_recieved": load.num_received,
            "additional_disk_usage": disk - self._reported_disk if self._reported_disk else 0.0,
            "disk_usage": disk,
            "working_request_idxs": [idx for idx in load.working if idx is not None],
            "url": self._identity.url,
        }
        if await self._deliver("worker_status", report, attempts) is Delivery.ACCEPTED:
            self._workload.mark_delivered(load)
            self._reported_activity, self._reported_disk = activity, disk
            self._reported_at = time.monotonic()
            self._is_overdue = False
            self.on_delivered()

    async def _send_ended(self, attempts: int) -> None:
        ended = list(islice(self._workload.ended, _MAX_ENDED_PER_REPORT))
        if not ended:
            return
        delivery = await self._deliver("delete_requests", self._ended_body(ended), attempts)
        if delivery is Delivery.REFUSED:
            delivery = await self._deliver_in_old_format(ended, attempts)
        if delivery is Delivery.ACCEPTED:
            self._workload.discard_ended(len(ended))
            self.on_delivered()

    async def _deliver_in_old_format(self, ended: list[EndedJob], attempts: int) -> "Delivery":
        """Report to an older autoscaler, which takes request numbers only: one body for the
        successful requests and one for the others.
        """
        delivery = Delivery.ACCEPTED
        for success in (True, False):
            indices = [job.request_idx for job in ended if job.success is success]
            if indices and delivery is Delivery.ACCEPTED:
                body = self._worker_fields() | {"request_idxs": indices, "success": success}
                delivery = await self._deliver("delete_requests", body, attempts)
        return delivery

    def _ended_body(self, ended: Iterable[EndedJob]) -> dict[str, object]:
        return self._worker_fields() | {
            "requests": [
                {
                    "request_idx": job.request_idx,
                    "success": job.success,
                    "status": str(job.outcome),
                    "entered_queue_at": job.entered_at,
                    "work_started_at": job.started_at,
                    "work_completed_at": job.completed_at,
                }
                for job in ended
            ]
        }

    def _worker_fields(self) -> dict[str, object]:
        identity = self._identity
        return {
            "worker_id": identity.container_id,
            "mtoken": identity.master_token.get_secret_value(),
        }

    async def _deliver(self, route: str, body: Mapping[str, object], attempts: int) -> "Delivery":
        """Post to the first address that accepts. Neither body nor response is logged, since both
        may contain secrets.
        """
        addresses = self._identity.report_addresses
        if route == "delete_requests":
            addresses = tuple(address for address in addresses if address != _CONSOLE)
        outcome = Delivery.FAILED if addresses else Delivery.ACCEPTED
        for address in addresses:
            for attempt in range(attempts):
                outcome = await self._post(f"{address}/{route}/", body)
                if outcome is Delivery.ACCEPTED:
                    return outcome
                if outcome is Delivery.REFUSED:
                    break
                if attempt + 1 < attempts:
                    await asyncio.sleep(_RETRY_PAUSE_S)
        return outcome

    async def _post(self, url: str, body: Mapping[str, object]) -> "Delivery":
        try:
            answer = await self._http.post(url, json=body, timeout=_TIMEOUT_S)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            logger.warning("report to %s failed: %s", url, type(error).__name__)
            return Delivery.FAILED
        if answer.is_success:
            return Delivery.ACCEPTED
        logger.warning("report to %s was answered %d", url, answer.status_code)
        return Delivery.REFUSED if answer.status_code in (400, 404, 422) else Delivery.FAILED


class Delivery(Enum):
    """Result of sending a report. A refused one would be refused again; a failed one is retried."""

    ACCEPTED = auto()
    REFUSED = auto()
    FAILED = auto()


def _disk_used() -> float:
    """Return the used space of the container's file system, in GiB."""
    return shutil.disk_usage("/").used / _GIB
