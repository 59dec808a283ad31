"""Reports to the autoscaler: this worker's state and load, and how each request ended.

What could not be delivered is told with the next report, and nothing that a client waits for
waits for a report.
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
from api.vast.books import Books, Ended
from api.vast.errors import Errors

VERSION = "1.1.0"
"""Of the protocol. The autoscaler takes a worker of another for a broken one."""

_CONSOLE = "https://cloud.vast.ai/api/v0"
"""Reported to by some templates. It takes no report of how requests ended."""
_TICK_S = 1.0
_QUIET_S = 10.0
"""What has not changed is told again after this long."""
_TIMEOUT_S = 10.0
_ATTEMPTS = 3
_PAUSE_S = 2.0
_MOST_ENDED = 1000
"""Told at a time."""
_LAST_WORDS_S = 3.0
_GIB = 1 << 30

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Readiness:
    """`load_s` is from the start of the process until loaded, 0 before; `max_perf` is the
    benchmark's, in tokens per second.
    """

    load_s: float = 0.0
    max_perf: float = 0.0


class Reporter:
    """`run` it in a task. `report_soon` when something happened that cannot wait for the tick."""

    def __init__(
        self,
        http: httpx2.AsyncClient,
        identity: Identity,
        books: Books,
        errors: Errors,
        readiness: Readiness,
    ) -> None:
        self._http = http
        self._identity = identity
        self._books = books
        self._errors = errors
        self._readiness = readiness
        self._soon = asyncio.Event()
        self._is_overdue = False
        self._told_at = float("-inf")
        self._told: tuple[object, ...] = ()
        self._told_disk = 0.0
        errors.on_change = self.report_soon

    def report_soon(self) -> None:
        self._soon.set()

    async def run(self) -> None:
        """For ever."""
        await asyncio.gather(self._every_tick(self._tell_state), self._every_tick(self._tell_ended))

    async def close(self) -> None:
        """The last words, if somebody listens."""
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._post_ended(attempts=1)
                await self._post_state(attempts=1)
        except TimeoutError:
            logger.warning("the autoscaler did not hear the last report")

    async def _every_tick(self, tell: Callable[[], Awaitable[None]]) -> None:
        """A worker that is not heard of is given up, so nothing ends this."""
        while True:
            try:
                await tell()
            except Exception:
                logger.exception("a report failed")
                await asyncio.sleep(_TICK_S)

    async def _tell_state(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._soon.wait(), _TICK_S)
        soon = self._soon.is_set()
        self._soon.clear()
        quiet_s = time.monotonic() - self._told_at
        is_active = self._readiness.load_s and self._told != self._activity
        if soon or self._is_overdue or is_active or quiet_s > _QUIET_S:
            self._is_overdue = True
            await self._post_state(_ATTEMPTS)

    async def _tell_ended(self) -> None:
        await asyncio.sleep(_TICK_S)
        if self._books.ended:
            await self._post_ended(_ATTEMPTS)

    @property
    def _activity(self) -> tuple[object, ...]:
        """It changes with whatever happens to a request."""
        load = self._books.load()
        return (load.num_received, load.working, load.rejected)

    async def _post_state(self, attempts: int) -> None:
        activity, load = self._activity, self._books.load()
        disk = await asyncio.to_thread(_disk_used)
        report = {
            "id": self._identity.container_id,
            "mtoken": self._identity.master_token.get_secret_value(),
            "version": VERSION,
            "loadtime": self._readiness.load_s,
            "cur_load": load.owed,
            "rej_load": load.rejected,
            "new_load": load.received,
            "error_msg": self._errors.message,
            "max_perf": self._readiness.max_perf,
            "cur_perf": load.served,
            "cur_capacity": 0,
            "max_capacity": 0,
            "num_requests_working": len(load.working),
            "num_requests_recieved": load.num_received,
            "additional_disk_usage": disk - self._told_disk if self._told_disk else 0.0,
            "disk_usage": disk,
            "working_request_idxs": [idx for idx in load.working if idx is not None],
            "url": self._identity.url,
        }
        if await self._deliver("worker_status", report, attempts) is Delivery.ACCEPTED:
            self._books.delivered(load)
            self._told, self._told_at, self._told_disk = activity, time.monotonic(), disk
            self._is_overdue = False

    async def _post_ended(self, attempts: int) -> None:
        ended = list(islice(self._books.ended, _MOST_ENDED))
        if not ended:
            return
        told = await self._deliver("delete_requests", self._ended_report(ended), attempts)
        if told is Delivery.REFUSED:
            told = await self._deliver_in_old_form(ended, attempts)
        if told is Delivery.ACCEPTED:
            self._books.forget(len(ended))

    async def _deliver_in_old_form(self, ended: list[Ended], attempts: int) -> "Delivery":
        """Of autoscalers before `requests` were listed: one body for each way to end."""
        told = Delivery.ACCEPTED
        for success in (True, False):
            indices = [each.request_idx for each in ended if each.success is success]
            if indices and told is Delivery.ACCEPTED:
                body = self._worker() | {"request_idxs": indices, "success": success}
                told = await self._deliver("delete_requests", body, attempts)
        return told

    def _ended_report(self, ended: Iterable[Ended]) -> dict[str, object]:
        return self._worker() | {
            "requests": [
                {
                    "request_idx": each.request_idx,
                    "success": each.success,
                    "status": str(each.outcome),
                    "entered_queue_at": each.entered_at,
                    "work_started_at": each.started_at,
                    "work_completed_at": each.completed_at,
                }
                for each in ended
            ]
        }

    def _worker(self) -> dict[str, object]:
        identity = self._identity
        return {
            "worker_id": identity.container_id,
            "mtoken": identity.master_token.get_secret_value(),
        }

    async def _deliver(self, route: str, body: Mapping[str, object], attempts: int) -> "Delivery":
        """To the first address that takes it. Neither body nor answer is logged."""
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
                    await asyncio.sleep(_PAUSE_S)
        return outcome

    async def _post(self, url: str, body: Mapping[str, object]) -> "Delivery":
        try:
            answer = await self._http.post(url, json=body, timeout=_TIMEOUT_S)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            logger.warning("no report to %s: %s", url, type(error).__name__)
            return Delivery.FAILED
        if answer.is_success:
            return Delivery.ACCEPTED
        logger.warning("%s answers a report with %d", url, answer.status_code)
        return Delivery.REFUSED if answer.status_code in (400, 404, 422) else Delivery.FAILED


class Delivery(Enum):
    """Of a report. What is refused would be refused again."""

    ACCEPTED = auto()
    REFUSED = auto()
    FAILED = auto()


def _disk_used() -> float:
    """GiB, of the container's own file system."""
    return shutil.disk_usage("/").used / _GIB
