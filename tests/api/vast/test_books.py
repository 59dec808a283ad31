"""What a worker that died leaves to the one after it."""

import json
from typing import Any

import pytest

from api.handover import Handover
from api.vast import workload as workloads
from api.vast.books import Books
from api.vast.signature import ReplayGuard
from api.vast.workload import Outcome, Workload


class Worker:
    """The parts of a worker that its books are about."""

    def __init__(self, handover: Handover) -> None:
        self.workload, self.replays = Workload(), ReplayGuard()
        self.books = Books(handover, self.workload, self.replays)

    def start(self, request_idx: object, tokens: float, generated: int = 0, **kind: Any) -> Any:
        job = self.workload.add_job(request_idx, tokens, **kind)
        self.workload.start(job)
        job.count_generated(generated)
        return job


def figures(workload: Workload) -> dict[str, float]:
    load = workload.load()
    return {
        "received": load.received,
        "served": load.served,
        "rejected": load.rejected,
        "pending": load.pending,
        "num_received": load.num_received,
    }


@pytest.fixture
def handover() -> Handover:
    return Handover()


def test_the_first_worker_begins_with_empty_books(handover: Handover) -> None:
    assert not any(figures(Worker(handover).workload).values())


def test_unreported_load_and_ends_go_over(handover: Handover) -> None:
    first = Worker(handover)
    first.workload.end(first.start(1, 10, 10), Outcome.SUCCESS)
    first.workload.end(first.workload.add_job(2, 7), Outcome.REJECTED)
    first.books.save()
    second = Worker(handover)
    assert figures(second.workload) == figures(first.workload)
    assert list(second.workload.ended) == list(first.workload.ended)
    assert figures(second.workload)["rejected"] == 7


def test_what_was_reported_is_not_reported_again(handover: Handover) -> None:
    first = Worker(handover)
    first.workload.end(first.start(1, 10, 10), Outcome.SUCCESS)
    first.workload.mark_delivered(first.workload.load())
    first.workload.discard_ended(1)
    first.books.save()
    second = Worker(handover).workload
    assert not second.ended
    assert figures(second) == dict.fromkeys(figures(second), 0) | {"num_received": 1}


def test_what_was_running_ended_in_an_error_and_is_no_load(handover: Handover) -> None:
    first = Worker(handover)
    first.start(1, 10, 4)
    first.start(2, 20)
    first.start(3, 5, 1, is_listed=False)
    first.start(4, 50, is_session=True)
    first.start(None, 8, 8)
    first.books.save()
    second = Worker(handover).workload
    assert [(end.request_idx, end.outcome) for end in second.ended] == [
        (1, Outcome.ERROR),
        (2, Outcome.ERROR),
        (4, Outcome.ERROR),
    ]
    for end in second.ended:
        assert 0 < end.entered_at <= end.started_at <= end.completed_at
    assert figures(second) == {
        "received": 13,
        "served": 13,
        "rejected": 0,
        "pending": 0,
        "num_received": 4,
    }


def test_totals_stay_right_over_many_deaths(handover: Handover) -> None:
    """Received is served and pending at all times, and reports never shrink."""
    reported = {"received": 0.0, "served": 0.0}
    for _ in range(5):
        worker = Worker(handover)
        load = worker.workload.load()
        reported = {name: total + getattr(load, name) for name, total in reported.items()}
        worker.workload.mark_delivered(load)
        worker.workload.end(worker.start(1, 3, 3), Outcome.SUCCESS)
        worker.start(2, 100, 7)
        worker.books.save()
    last = Worker(handover).workload.load()
    assert {name: total + getattr(last, name) for name, total in reported.items()} == {
        "received": 50.0,
        "served": 50.0,
    }


def test_an_envelope_is_refused_by_the_next_worker_and_new_numbers_are_not(
    handover: Handover,
) -> None:
    first = Worker(handover)
    for number in range(1000, 1120):
        assert first.replays.admit(number, b"%d" % number)
    first.books.save()
    second = Worker(handover).replays
    assert not any(second.admit(number, b"%d" % number) for number in range(1020, 1120))
    assert second.admit(0, b"0")  # the autoscaler counts anew
    assert second.admit(1120, b"1120")


@pytest.mark.parametrize("request_idx", [2**80, "\ud800", 1.5, [1]])
def test_any_index_can_be_kept(request_idx: object, handover: Handover) -> None:
    first = Worker(handover)
    first.start(request_idx, 1)
    first.books.save()
    assert Worker(handover).workload.ended[0].request_idx == request_idx


def test_ends_beyond_the_limit_are_the_oldest_that_are_lost(
    handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads, "_MAX_KEPT", 3)
    first = Worker(handover)
    for number in range(5):
        first.workload.end(first.start(number, 1, 1), Outcome.SUCCESS)
    first.books.save()
    assert [end.request_idx for end in Worker(handover).workload.ended] == [2, 3, 4]


def test_books_that_cannot_be_kept_are_no_fault(
    handover: Handover, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(handover)
    worker.books.save()
    worker.start("x" * (1 << 24), 1)
    worker.books.save()
    assert "cannot be saved" in caplog.text
    assert json.loads(handover.books)["workload"]["working"] == []
