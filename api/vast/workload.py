"""This worker's workload in tokens, as Vast's autoscaler counts it, and how each request ended.

The unit of workload is one token to be generated. A request adds the most tokens it may generate
to `received`. Each generated token moves from pending to `served`. When a request ends early or is
cancelled, its pending tokens are subtracted from `received` again. So at any time:
received = served + pending.

A report contains the growth of these totals since the last delivered report. So an undelivered
report loses nothing, nor does anything that happens while a report is being sent.
"""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from enum import StrEnum
from typing import Any

DEFAULT_WORKLOAD = 100
"""Workload of a request that names no token limit: the default of both TGI and Vast."""
MAX_WORKLOAD = 1 << 32
"""Largest workload of one job. No model generates that many tokens, and sums of such numbers stay
exact in a float.
"""
_MAX_KEPT = 5000
"""Most ended jobs in a snapshot. There are more only if the autoscaler is away for long."""


class Outcome(StrEnum):
    """How a request ended, in Vast's words."""

    SUCCESS = "Success"
    ERROR = "Error"
    CANCELLED = "Cancelled"
    REJECTED = "Rejected"


class Job:
    """A request or an open session, from its arrival to its end.

    A job is the `Meter` (see `api.telemetry.observation`) of the request it stands for.

    is_listed   False for a request inside a session: reports list the session instead
    is_session  a session's pending tokens are served when it ends, and no request waits for them
    """

    __slots__ = (
        "_declared_tokens",
        "_max_new_tokens",
        "_workload",
        "entered_at",
        "failed",
        "generated",
        "is_listed",
        "is_session",
        "refused",
        "request_idx",
        "started_at",
    )

    def __init__(
        self,
        workload: "Workload",
        request_idx: object,
        declared_tokens: float,
        is_listed: bool,
        is_session: bool,
    ) -> None:
        self._workload = workload
        self._declared_tokens = declared_tokens
        self._max_new_tokens = 0
        self.request_idx = request_idx
        self.is_listed = is_listed
        self.is_session = is_session
        self.entered_at = time.time()
        self.started_at = 0.0
        self.generated = 0
        self.failed = False
        self.refused = False

    @property
    def tokens(self) -> float:
        """The most tokens its accepted generations may have; before any is accepted, the number
        that the request declares.
        """
        return max(self._max_new_tokens or self._declared_tokens, self.generated)

    @property
    def pending(self) -> float:
        """Tokens that may still be generated."""
        return self.tokens - self.generated

    def count_accepted(self, max_new_tokens: int) -> None:
        """Add a generation that passed validation."""
        before = self.tokens
        self._max_new_tokens += max_new_tokens
        self._workload.update(self, self.tokens - before, 0)

    def count_generated(self, num_tokens: int) -> None:
        """Count tokens that were just generated."""
        before = self.tokens
        self.generated += num_tokens
        self._workload.update(self, self.tokens - before, num_tokens)

    def mark_failed(self) -> None:
        """Record that a generation failed by the worker's fault."""
        self.failed = True

    def mark_refused(self) -> None:
        """Record that a generation was refused because every permit was taken. The status code
        alone does not tell: a stream reports this after it answered 200.
        """
        self.refused = True


@dataclass(frozen=True, slots=True)
class EndedJob:
    """How a job ended, as reported to the autoscaler. Times are seconds since the epoch, or 0."""

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
    """Tokens since the worker started."""

    received: float = 0.0
    served: float = 0.0
    rejected: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """The load figures of one report. `received`, `served` and `rejected` are the growth since
    the last delivered report; `totals` are the totals up to this one.
    """

    totals: Totals
    received: float
    served: float
    rejected: float
    pending: float
    working: tuple[object, ...]
    num_received: int


class Workload:
    """Tokens received, served and pending in this worker. Used on the event loop only."""

    def __init__(self) -> None:
        self.working: dict[Job, None] = {}
        self.ended: deque[EndedJob] = deque()
        self.num_received = 0
        self._received = self._served = self._rejected = 0.0
        self._delivered = Totals()

    def add_job(
        self,
        request_idx: object,
        declared_tokens: float,
        *,
        is_listed: bool = True,
        is_session: bool = False,
    ) -> Job:
        """Create the job of a request that arrived. It counts as load once it is started."""
        self.num_received += is_listed
        return Job(self, request_idx, declared_tokens, is_listed, is_session)

    def start(self, job: Job) -> None:
        """Count `job` as load."""
        job.started_at = time.time()
        self.working[job] = None
        self._received += job.tokens

    def end(self, job: Job, outcome: Outcome) -> None:
        """Remove `job`, started or not, and record how it ended."""
        started = job in self.working
        self.working.pop(job, None)
        if started and job.is_session:
            self._served += job.pending
        elif started:
            self._received -= job.pending
        if outcome is Outcome.REJECTED:
            self._rejected += job.tokens
        if job.is_listed and job.request_idx is not None:
            self.ended.append(_ended(job, outcome))

    def update(self, job: Job, num_added: float, num_generated: int) -> None:
        """Count tokens of a running job. Ignored after the job's end, when a last step may still
        deliver tokens.
        """
        if job in self.working:
            self._received += num_added
            self._served += num_generated

    @property
    def pending(self) -> float:
        """Tokens that all running jobs may still generate."""
        return sum(job.pending for job in self.working)

    def wait_s(self, perf: float) -> float:
        """Seconds until all pending tokens are generated, at `perf` tokens per second. Sessions
        are left out: their cost is a number chosen by the client, and nothing is computed for it.
        """
        pending = sum(job.pending for job in self.working if not job.is_session)
        return pending / max(perf, 1e-5)

    def load(self) -> Load:
        """Return the figures for the next report."""
        return Load(
            totals=Totals(self._received, self._served, self._rejected),
            received=max(self._received - self._delivered.received, 0.0),
            served=self._served - self._delivered.served,
            rejected=self._rejected - self._delivered.rejected,
            pending=self.pending,
            working=tuple(job.request_idx for job in self.working if job.is_listed),
            num_received=self.num_received,
        )

    def mark_delivered(self, load: Load) -> None:
        """Record that the report with `load` arrived. If `received` shrank since the report before
        it, that difference is taken off the following reports: they cannot be negative.
        """
        totals = load.totals
        received = max(totals.received, self._delivered.received)
        self._delivered = Totals(received, totals.served, totals.rejected)

    def snapshot(self) -> dict[str, Any]:
        """Return all figures in JSON's types, for the `restore` of another process."""
        return {
            "num_received": self.num_received,
            "totals": [self._received, self._served, self._rejected],
            "delivered": astuple(self._delivered),
            "ended": [astuple(ended) for ended in self.ended][-_MAX_KEPT:],
            "working": [
                (
                    job.request_idx if job.is_listed else None,
                    job.entered_at,
                    job.started_at,
                    job.pending,
                )
                for job in self.working
            ],
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from the figures of a worker that died. What it was working on ended in an error,
        at this moment.
        """
        self.num_received = snapshot["num_received"]
        self._received, self._served, self._rejected = snapshot["totals"]
        self._delivered = Totals(*snapshot["delivered"])
        self.ended.extend(EndedJob(idx, Outcome(o), *times) for idx, o, *times in snapshot["ended"])
        for idx, entered_at, started_at, pending in snapshot["working"]:
            self._received -= pending
            if idx is not None:
                ended = EndedJob(idx, Outcome.ERROR, entered_at, started_at, time.time())
                self.ended.append(ended)

    def discard_ended(self, num_ended: int) -> None:
        """Drop the first `num_ended` entries of `ended`, which have been reported."""
        for _ in range(num_ended):
            self.ended.popleft()


def _ended(job: Job, outcome: Outcome) -> EndedJob:
    """Times that have no meaning for an outcome are 0, as in Vast's stock worker."""
    started_at = 0.0 if outcome is Outcome.REJECTED else job.started_at
    completed = outcome in (Outcome.SUCCESS, Outcome.ERROR)
    completed_at = time.time() if completed else 0.0
    return EndedJob(job.request_idx, outcome, job.entered_at, started_at, completed_at)


def declared_tokens(payload: Mapping[str, Any]) -> float:
    """Return the tokens that a request may generate by its own words, before validation."""
    parameters = payload.get("parameters")
    named = parameters if isinstance(parameters, dict) else payload
    for name in ("max_new_tokens", "max_completion_tokens", "max_tokens", "max_output_tokens"):
        limit = named.get(name)
        if isinstance(limit, int | float) and limit > 0:
            return float(min(limit, MAX_WORKLOAD))
    return float(DEFAULT_WORKLOAD)
