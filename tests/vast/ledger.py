"""A ledger of everything that workers report to the autoscaler, which checks that it adds up.

Each time a client is sent to a worker is an attempt. The worker must report one deletion for each
attempt, and the sums in its reports must satisfy: received = served + cancelled + errored +
rejected.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Numbers = (int, float)
REPORT_KEYS: dict[str, type | tuple[type, ...]] = {
    "id": int,
    "mtoken": str,
    "version": str,
    "loadtime": Numbers,
    "cur_load": Numbers,
    "rej_load": Numbers,
    "new_load": Numbers,
    "error_msg": str,
    "max_perf": Numbers,
    "cur_perf": Numbers,
    "cur_capacity": Numbers,
    "max_capacity": Numbers,
    "num_requests_working": int,
    "num_requests_recieved": int,
    "additional_disk_usage": Numbers,
    "disk_usage": Numbers,
    "working_request_idxs": list,
    "url": str,
}
NEVER_NEGATIVE = (
    "loadtime",
    "cur_load",
    "rej_load",
    "new_load",
    "max_perf",
    "cur_perf",
    "num_requests_working",
    "num_requests_recieved",
    "disk_usage",
)
BEACON_KEYS = {"id", "mtoken", "version", "error_msg", "url"}
"""The keys of the report that Vast's start script sends when it gives up."""


@dataclass(frozen=True)
class Attempt:
    """A client was sent to a worker. `request_idx` is None in the form that has none."""

    at: float
    worker_id: int
    reqnum: int
    request_idx: int | None
    cost: float


@dataclass(frozen=True)
class Report:
    """A body of /worker_status/, and the address at which it arrived."""

    at: float
    address: str
    body: dict[str, Any]

    @property
    def worker_id(self) -> int:
        return int(self.body["id"])

    @property
    def loaded(self) -> bool:
        return self.number("loadtime") > 0

    def number(self, key: str) -> float:
        return float(self.body.get(key, 0))

    def faults(self) -> list[str]:
        """Return a line for each field that no correct worker would send."""
        if set(self.body) == BEACON_KEYS and self.body["error_msg"]:
            return []
        faults = [
            f"{key} is {self.body.get(key)!r}"
            for key, kind in REPORT_KEYS.items()
            if not _is_a(self.body.get(key), kind)
        ]
        faults += [f"{key} is negative" for key in NEVER_NEGATIVE if self.number(key) < 0]
        if self.body.get("version") != "1.1.0":
            faults.append("version is not 1.1.0")
        if self.loaded and not self.body.get("error_msg") and self.number("max_perf") <= 0:
            faults.append("loaded with a max_perf of 0")
        # There may be fewer: requests in the oldest form or without an envelope have no index.
        if len(self.body.get("working_request_idxs", ())) > self.number("num_requests_working"):
            faults.append("working_request_idxs are not num_requests_working")
        return faults


@dataclass(frozen=True)
class Deletion:
    """An entry of /delete_requests/. The older format has `success` only, and no times."""

    at: float
    address: str
    worker_id: int
    request_idx: int
    success: bool
    status: str | None = None
    entered_queue_at: float = 0.0
    work_started_at: float = 0.0
    work_completed_at: float = 0.0

    def summary(self) -> str:
        """Return one line for the console."""
        outcome = self.status or f"success {self.success}"
        took_s = self.work_completed_at - self.entered_queue_at
        took = f" after {took_s:.2f} s" if took_s > 0 else ""
        return f"request {self.request_idx} is over: {outcome}{took}"

    def faults(self) -> list[str]:
        """Return a line if the fields contradict each other."""
        entered, started, completed = (
            self.entered_queue_at,
            self.work_started_at,
            self.work_completed_at,
        )
        match self.status:
            case None:
                right = True
            case "Success" | "Error":
                succeeded = self.status == "Success"
                right = self.success is succeeded and 0 < entered <= started <= completed
            case "Cancelled":
                right = self.success and completed == 0 and (started == 0 or started >= entered > 0)
            case "Rejected":
                right = not self.success and entered > 0 and started == completed == 0
            case _:
                right = False
        return [] if right else [f"an entry that contradicts itself: {self}"]


@dataclass
class Ledger:
    """All attempts, reports and deletions of one autoscaler."""

    attempts: list[Attempt] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    deletions: list[Deletion] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def worker_ids(self) -> list[int]:
        return sorted({report.worker_id for report in self.reports})

    def reports_of(self, worker_id: int) -> list[Report]:
        return [report for report in self.reports if report.worker_id == worker_id]

    def loadtimes(self, worker_id: int) -> list[float]:
        """Return the distinct load times that were reported: one for each start of the worker,
        which repeats it in every report.
        """
        told = (report.number("loadtime") for report in self.reports_of(worker_id))
        return list(dict.fromkeys(loadtime for loadtime in told if loadtime))

    def complaints(self, in_sessions: float = 0.0, unused: float = 0.0) -> list[str]:
        """Return a line for everything that does not add up.

        Call this when all requests have ended, since a request in flight is a complaint. It assumes
        that clients went where they were sent, that their cost is the worker's workload, and that
        attempts without deletions were served. `in_sessions` is the workload of requests inside
        sessions, for which there are no attempts. `unused` is the workload of tokens that were not
        generated although the request succeeded: a worker may take it off again.
        """
        return [
            *(f"refused: {refusal}" for refusal in self.refusals),
            *(f"report: {fault}" for report in self.reports for fault in report.faults()),
            *(f"deletion: {fault}" for entry in self.deletions for fault in entry.faults()),
            *self._deletion_complaints(),
            *(x for worker in self.worker_ids() for x in self._left_over(worker)),
            *self._load_complaints(in_sessions, unused),
        ]

    def _deletion_complaints(self) -> Iterator[str]:
        owed = Counter(x.request_idx for x in self.attempts if x.request_idx is not None)
        made = Counter(x.request_idx for x in self.deletions)
        for request_idx in sorted(owed.keys() | made.keys()):
            if owed[request_idx] != made[request_idx]:
                yield (
                    f"request {request_idx}: {owed[request_idx]} attempts, "
                    f"{made[request_idx]} deletions"
                )

    def _left_over(self, worker_id: int) -> Iterator[str]:
        reports = self.reports_of(worker_id)
        for key in ("cur_load", "num_requests_working"):
            if reports[-1].number(key):
                yield f"worker {worker_id}: {key} is {reports[-1].number(key)} at last"
        reqnums = {x.reqnum for x in self.attempts if x.worker_id == worker_id}
        received = _over_restarts(report.number("num_requests_recieved") for report in reports)
        if received != len(reqnums):
            yield f"worker {worker_id}: {received} requests received, {len(reqnums)} sent"

    def _load_complaints(self, in_sessions: float, unused: float) -> Iterator[str]:
        if any(entry.status is None for entry in self.deletions):
            return  # the older format does not tell errors from rejections
        owed = self._cost_by_status()
        new, served, rejected = (
            sum(report.number(key) for report in self.reports)
            for key in ("new_load", "cur_perf", "rej_load")
        )
        # A worker may count tokens as they are generated, also for requests that fail later.
        due, unfinished = owed["Success"] + in_sessions, owed["Cancelled"] + owed["Error"]
        if not -unused - 0.01 <= served - due <= unfinished + 0.01:
            yield f"load served: {served} reported, {due} due"
        if not _close(rejected, owed["Rejected"]):
            yield f"load rejected: {rejected} reported, {owed['Rejected']} due"
        # Tokens cancelled after they were reported are taken off the next report, down to zero.
        if not -unused - 0.01 <= new - due <= unfinished + 0.01:
            yield f"load received: {new} reported, {due} due and {unfinished} unfinished"

    def _cost_by_status(self) -> dict[str, float]:
        """Return the sum of costs by status. Attempts and deletions of a request are matched in
        order.
        """
        entries: defaultdict[int | None, list[Deletion]] = defaultdict(list)
        for entry in self.deletions:
            entries[entry.request_idx].append(entry)
        costs: defaultdict[str, float] = defaultdict(int)
        for attempt in self.attempts:
            if attempt.request_idx is None:  # the oldest form has no deletions
                costs["Success"] += attempt.cost
            elif entries[attempt.request_idx]:
                status = entries[attempt.request_idx].pop(0).status
                costs[status or ""] += attempt.cost
        return costs


def _is_a(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _over_restarts(values: Iterable[float]) -> float:
    """Return the total of a counter that restarts from zero with each process."""
    return sum(before for before, after in pairwise([*values, 0]) if after < before)


def _close(left: float, right: float) -> bool:
    return abs(left - right) < 0.01
