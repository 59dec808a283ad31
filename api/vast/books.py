"""The books: what came, what it costs in tokens, and how it ended.

The unit of all workload is a token to be generated. A request owes as many as it may have; each
that is generated is served and owed no more; what is still owed when it ends, early or by
cancellation, is given back. So at any time: received = served + owed + given back.

Totals only grow, and a report tells what they grew by since the last one that was delivered:
nothing is lost to a report that was not, nor what happens while one is on its way.
"""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

DEFAULT_WORKLOAD = 100
"""Of a request that names no limit. TGI's own default, and the platform's."""
MAX_WORKLOAD = 1 << 32
"""Of one job. No model generates as many, and sums of them stay exact in a float."""


class Outcome(StrEnum):
    SUCCESS = "Success"
    ERROR = "Error"
    CANCELLED = "Cancelled"
    REJECTED = "Rejected"


class Job:
    """A request, or an open session, from its arrival to its end.

    The application is told nothing of it but that it meters what it does: see
    `api.telemetry.observation`.
    A job in a session is not `listed`, since the session is; and a session `is_work` for nobody:
    what it owes is served by its having been open.
    """

    __slots__ = (
        "_accepted",
        "_books",
        "_declared",
        "entered_at",
        "failed",
        "generated",
        "is_work",
        "listed",
        "refused",
        "request_idx",
        "started_at",
    )

    def __init__(
        self, books: "Books", request_idx: object, workload: float, listed: bool, is_work: bool
    ) -> None:
        self._books = books
        self._declared = workload
        self._accepted = 0
        self.request_idx = request_idx
        self.listed = listed
        self.is_work = is_work
        self.entered_at = time.time()
        self.started_at = 0.0
        self.generated = 0
        self.failed = False
        self.refused = False

    @property
    def workload(self) -> float:
        """What its generations may have, once they are known; until then what it says."""
        return max(self._accepted or self._declared, self.generated)

    @property
    def owed(self) -> float:
        return self.workload - self.generated

    def accept(self, max_new_tokens: int) -> None:
        """One of its generations passed its checks."""
        before = self.workload
        self._accepted += max_new_tokens
        self._books.changed(self, self.workload - before, 0)

    def generate(self, num_tokens: int) -> None:
        before = self.workload
        self.generated += num_tokens
        self._books.changed(self, self.workload - before, num_tokens)

    def fail(self) -> None:
        """One of its generations came to nothing by a fault of ours."""
        self.failed = True

    def refuse(self) -> None:
        """There was no room for one; a stream says so in an answer that began well."""
        self.refused = True


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended, as the autoscaler is told. Times are those of the epoch, or 0."""

    request_idx: object
    outcome: Outcome
    entered_at: float
    started_at: float
    completed_at: float

    @property
    def success(self) -> bool:
        return self.outcome in (Outcome.SUCCESS, Outcome.CANCELLED)


@dataclass(frozen=True, slots=True)
class Totals:
    received: float = 0.0
    served: float = 0.0
    rejected: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """What a report says of it. `totals` are those it speaks of, for `Books.delivered`."""

    totals: Totals
    received: float
    served: float
    rejected: float
    owed: float
    working: tuple[object, ...]
    num_received: int


class Books:
    """Kept on the event loop."""

    def __init__(self) -> None:
        self.working: dict[Job, None] = {}
        self.ended: deque[Ended] = deque()
        self.num_received = 0
        self._received = self._served = self._rejected = 0.0
        self._told = Totals()

    def enter(
        self, request_idx: object, workload: float, *, listed: bool = True, is_work: bool = True
    ) -> Job:
        """It has come; what becomes of it is open."""
        self.num_received += listed
        return Job(self, request_idx, workload, listed, is_work)

    def start(self, job: Job) -> None:
        job.started_at = time.time()
        self.working[job] = None
        self._received += job.workload

    def end(self, job: Job, outcome: Outcome) -> None:
        """Whether it was started or not."""
        started = job in self.working
        self.working.pop(job, None)
        if started and job.is_work:
            self._received -= job.owed
        elif started:
            self._served += job.owed
        if outcome is Outcome.REJECTED:
            self._rejected += job.workload
        if job.listed and job.request_idx is not None:
            self.ended.append(_ended(job, outcome))

    def changed(self, job: Job, workload: float, num_generated: int) -> None:
        """While it runs; what its generations do after its end is of no account."""
        if job in self.working:
            self._received += workload
            self._served += num_generated

    @property
    def owed(self) -> float:
        return sum(job.owed for job in self.working)

    def wait_s(self, perf: float) -> float:
        """Until all that is to be generated has been, at so many tokens per second. What a
        session costs is a number of its client's, and nobody waits for it.
        """
        return sum(job.owed for job in self.working if job.is_work) / max(perf, 1e-5)

    def load(self) -> Load:
        """Since the last report that was delivered, and now."""
        return Load(
            totals=Totals(self._received, self._served, self._rejected),
            received=max(self._received - self._told.received, 0.0),
            served=self._served - self._told.served,
            rejected=self._rejected - self._told.rejected,
            owed=self.owed,
            working=tuple(job.request_idx for job in self.working if job.listed),
            num_received=self.num_received,
        )

    def delivered(self, load: Load) -> None:
        """What was given back beyond what came since is set off against what comes next."""
        totals = load.totals
        received = max(totals.received, self._told.received)
        self._told = Totals(received, totals.served, totals.rejected)

    def forget(self, num_ended: int) -> None:
        """The first of `ended` have been told."""
        for _ in range(num_ended):
            self.ended.popleft()


def _ended(job: Job, outcome: Outcome) -> Ended:
    """A time that has no meaning for an outcome is 0, as the platform's own worker has it."""
    started_at = 0.0 if outcome is Outcome.REJECTED else job.started_at
    completed = outcome in (Outcome.SUCCESS, Outcome.ERROR)
    completed_at = time.time() if completed else 0.0
    return Ended(job.request_idx, outcome, job.entered_at, started_at, completed_at)


def workload_of(payload: Mapping[str, Any]) -> float:
    """Tokens that a request may generate, as it says itself before anything is checked."""
    parameters = payload.get("parameters")
    named = parameters if isinstance(parameters, dict) else payload
    for name in ("max_new_tokens", "max_completion_tokens", "max_tokens"):
        limit = named.get(name)
        if isinstance(limit, int | float) and limit > 0:
            return float(min(limit, MAX_WORKLOAD))
    return float(DEFAULT_WORKLOAD)
