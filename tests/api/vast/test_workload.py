"""The workload's totals add up, whatever happens and whichever reports are delivered."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from api.vast.workload import (
    DEFAULT_WORKLOAD,
    MAX_WORKLOAD,
    Job,
    Load,
    Outcome,
    Workload,
    declared_tokens,
)

BAD_LIMITS: list[object] = [0, -1, float("nan"), float("-inf"), None, "256", []]
TOKENS = st.integers(0, 500)


@dataclass
class Truth:
    """What happened, counted independently of `Workload`."""

    received: int = 0
    served: int = 0
    given_back: int = 0
    rejected: int = 0
    ended: list[object] = field(default_factory=list)
    told_received: float = 0
    told_served: float = 0
    told_rejected: float = 0
    told_ended: list[object] = field(default_factory=list)


@dataclass
class Account:
    """The tokens of one running job."""

    limit: int
    accepted: int = 0
    generated: int = 0

    @property
    def tokens(self) -> int:
        return max(self.accepted or self.limit, self.generated)


class RandomRequests(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.workload, self.truth = Workload(), Truth()
        self.running: dict[Job, Account] = {}
        self.on_its_way: tuple[Load, int] | None = None
        self.num_jobs = 0

    @rule(limit=TOKENS, idx=st.none() | st.integers(0, 3), is_listed=st.booleans())
    def starts(self, limit: int, idx: int | None, is_listed: bool) -> None:
        job = self.workload.add_job(idx, limit, is_listed=is_listed)
        self.workload.start(job)
        self.num_jobs += is_listed
        self.running[job] = Account(limit)
        self.truth.received += limit

    @rule(limit=TOKENS, idx=st.none() | st.integers(0, 3))
    def is_rejected_at_the_door(self, limit: int, idx: int | None) -> None:
        self.workload.end(self.workload.add_job(idx, limit), Outcome.REJECTED)
        self.num_jobs += 1
        self.truth.rejected += limit
        if idx is not None:
            self.truth.ended.append((idx, Outcome.REJECTED))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), limit=st.integers(1, 500))
    def passes_its_checks(self, data: st.DataObject, limit: int) -> None:
        self._change(data, limit, 0)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 50))
    def generates(self, data: st.DataObject, count: int) -> None:
        self._change(data, 0, count)

    def _change(self, data: st.DataObject, limit: int, count: int) -> None:
        job = data.draw(st.sampled_from(list(self.running)))
        account = self.running[job]
        before = account.tokens
        account.accepted += limit
        account.generated += count
        if limit:
            job.count_accepted(limit)
        if count:
            job.count_generated(count)
        self.truth.received += account.tokens - before
        self.truth.served += count

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def ends(self, data: st.DataObject, outcome: Outcome) -> None:
        job = data.draw(st.sampled_from(list(self.running)))
        account = self.running.pop(job)
        self.workload.end(job, outcome)
        job.count_generated(7)  # a last step that was under way
        self.truth.given_back += account.tokens - account.generated
        if outcome is Outcome.REJECTED:
            self.truth.rejected += account.tokens
        if job.is_listed and job.request_idx is not None:
            self.truth.ended.append((job.request_idx, outcome))

    @precondition(lambda self: self.on_its_way is None)
    @rule()
    def a_report_leaves(self) -> None:
        self.on_its_way = self.workload.load(), len(self.workload.ended)

    @precondition(lambda self: self.on_its_way is not None)
    @rule(is_heard=st.booleans())
    def a_report_arrives(self, is_heard: bool) -> None:
        assert self.on_its_way is not None
        load, num_ended = self.on_its_way
        self.on_its_way = None
        if is_heard:
            self._hear(load, num_ended)

    def _hear(self, load: Load, num_ended: int) -> None:
        truth = self.truth
        truth.told_received += load.received
        truth.told_served += load.served
        truth.told_rejected += load.rejected
        told = [self.workload.ended[n] for n in range(num_ended)]
        truth.told_ended += [(each.request_idx, each.outcome) for each in told]
        self.workload.mark_delivered(load)
        self.workload.discard_ended(num_ended)

    @invariant()
    def received_is_served_and_owed_and_given_back(self) -> None:
        truth = self.truth
        assert truth.received == truth.served + self.workload.pending + truth.given_back

    @invariant()
    def what_is_owed_is_what_runs(self) -> None:
        load, accounts = self.workload.load(), self.running.values()
        assert load.pending == sum(account.tokens - account.generated for account in accounts)
        assert len(load.working) == sum(job.is_listed for job in self.running)
        assert load.num_received == self.num_jobs

    @invariant()
    def no_report_tells_of_less_than_nothing(self) -> None:
        load = self.workload.load()
        assert min(load.received, load.served, load.rejected, load.pending) >= 0

    @invariant()
    def reports_come_to_the_truth(self) -> None:
        """Tokens given back after they were reported are taken off the following reports."""
        load, truth = self.workload.load(), self.truth
        assert truth.told_served + load.served == truth.served
        assert truth.told_rejected + load.rejected == truth.rejected
        net = truth.received - truth.given_back
        told = truth.told_received + load.received
        assert told >= net
        assert told == max(truth.told_received, net)

    @invariant()
    def every_end_is_told_once(self) -> None:
        left = [(each.request_idx, each.outcome) for each in self.workload.ended]
        assert self.truth.told_ended + left == self.truth.ended

    def teardown(self) -> None:
        """End all jobs, receive more than was ever given back, and deliver a last report."""
        self.on_its_way = None
        for job in list(self.running):
            job.mark_failed()
            self.workload.end(job, Outcome.CANCELLED)
            account = self.running.pop(job)
            self.truth.given_back += account.tokens - account.generated
        truth = self.truth
        extra = int(truth.told_received) + truth.given_back - truth.received + 1000
        job = self.workload.add_job(None, extra)
        self.workload.start(job)
        job.count_generated(extra)
        self.workload.end(job, Outcome.SUCCESS)
        self._hear(self.workload.load(), 0)
        assert self.workload.pending == 0
        assert truth.told_served == truth.told_received == truth.served + extra


TestRandomRequests = RandomRequests.TestCase
TestRandomRequests.settings = settings(
    derandomize=True, deadline=None, max_examples=60, stateful_step_count=40
)


def test_a_cancelled_job_gives_its_pending_tokens_back() -> None:
    workload = Workload()
    job = workload.add_job(1, 100)
    workload.start(job)
    job.count_generated(30)
    workload.end(job, Outcome.CANCELLED)
    load = workload.load()
    assert (load.received, load.served, load.pending) == (30, 30, 0)


def test_tokens_given_back_after_a_report_are_taken_off_the_next_ones() -> None:
    workload = Workload()
    job = workload.add_job(1, 100)
    workload.start(job)
    workload.mark_delivered(workload.load())
    workload.end(job, Outcome.CANCELLED)
    assert workload.load().received == 0
    workload.mark_delivered(workload.load())
    workload.start(workload.add_job(2, 120))
    assert workload.load().received == 20


def test_tokens_after_the_end_of_a_job_are_not_counted() -> None:
    workload = Workload()
    job = workload.add_job(1, 100)
    workload.start(job)
    workload.end(job, Outcome.SUCCESS)
    job.count_accepted(50)
    job.count_generated(50)
    load = workload.load()
    assert (load.received, load.served, load.pending) == (0, 0, 0)


@pytest.mark.parametrize(
    ("payload", "tokens"),
    [
        ({"parameters": {"max_new_tokens": 256}}, 256),
        ({"parameters": {"max_new_tokens": 1}, "max_tokens": 9}, 1),
        ({"max_tokens": 9}, 9),
        ({"max_completion_tokens": 7, "max_tokens": 9}, 7),
        ({"max_output_tokens": 7}, 7),
        ({"parameters": {}}, DEFAULT_WORKLOAD),
        ({"parameters": None, "max_tokens": 9}, 9),
        ({}, DEFAULT_WORKLOAD),
        *[({"parameters": {"max_new_tokens": limit}}, DEFAULT_WORKLOAD) for limit in BAD_LIMITS],
        *[
            ({"parameters": {"max_new_tokens": limit}}, MAX_WORKLOAD)
            for limit in (10**400, 1e308, float("inf"))
        ],
    ],
)
def test_a_request_declares_the_tokens_it_may_generate(
    payload: dict[str, object], tokens: float
) -> None:
    assert declared_tokens(payload) == tokens
