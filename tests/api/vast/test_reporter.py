"""Reports: their contents, their times, and that nothing is lost when some are not delivered."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr

from api.settings.vast_variables import Identity
from api.vast.active_errors import ActiveErrors
from api.vast.reporter import Readiness, Reporter
from api.vast.workload import Outcome, Workload
from tests.api.vast.clock import EPOCH, TIME, VirtualLoop, now
from tests.api.vast.worker import TOKEN, URL, Autoscaler

pytestmark = pytest.mark.anyio

FIRST, SECOND = "https://a.example/api/v0", "https://b.example"
CONSOLE = "https://cloud.vast.ai/api/v0"
GIB = 1 << 30


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


@pytest.fixture(autouse=True)
def _virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.vast.reporter.time", TIME)
    monkeypatch.setattr("api.vast.workload.time", TIME)
    monkeypatch.setattr("api.vast.reporter._disk_used", lambda: 31.25)


class Reported:
    """A reporter with a fake autoscaler. `times` are the times of its status reports."""

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self.autoscaler = Autoscaler("")
        self.autoscaler.on_request = self._hear
        self.on_request: Callable[[str], None] = lambda _: None
        self.times: list[float] = []
        self.workload, self.errors, self.readiness = Workload(), ActiveErrors(), Readiness()
        identity = Identity(4242, SecretStr(TOKEN), addresses, URL)
        self.reporter = Reporter(
            self.autoscaler.client(), identity, self.workload, self.errors, self.readiness
        )

    def _hear(self, url: str) -> None:
        if "worker_status" in url:
            self.times.append(now())
        self.on_request(url)

    @property
    def states(self) -> list[Any]:
        return self.autoscaler.bodies("worker_status")

    @property
    def deletions(self) -> list[Any]:
        return self.autoscaler.bodies("delete_requests")

    def serve(self, idx: object, num_tokens: int, outcome: Outcome = Outcome.SUCCESS) -> None:
        """Let a request arrive, generate and end at once."""
        job = self.workload.add_job(idx, num_tokens)
        self.workload.start(job)
        job.count_generated(num_tokens)
        self.workload.end(job, outcome)

    def be_ready(self) -> None:
        self.readiness.load_s, self.readiness.max_perf = 12.5, 640.0
        self.reporter.report_soon()


@asynccontextmanager
async def reporting(*addresses: str) -> AsyncIterator[Reported]:
    reported = Reported(addresses or (FIRST,))
    running = asyncio.create_task(reported.reporter.run())
    yield reported
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


# -- contents -------------------------------------------------------------------


async def test_the_first_report_is_sent_after_a_second_with_a_loadtime_of_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("api.vast.reporter._disk_used", lambda: 31.25)
    async with reporting() as reported:
        await asyncio.sleep(1.5)
        assert reported.times == [1.0]
        assert reported.autoscaler.urls() == [f"{FIRST}/worker_status/"]
        assert reported.states == [
            {
                "id": 4242,
                "mtoken": TOKEN,
                "version": "1.1.0",
                "loadtime": 0.0,
                "cur_load": 0,
                "rej_load": 0,
                "new_load": 0,
                "error_msg": "",
                "max_perf": 0.0,
                "cur_perf": 0,
                "cur_capacity": 0,
                "max_capacity": 0,
                "num_requests_working": 0,
                "num_requests_recieved": 0,
                "additional_disk_usage": 0.0,
                "disk_usage": 31.25,
                "working_request_idxs": [],
                "url": URL,
            }
        ]


async def test_a_report_contains_served_and_pending_tokens() -> None:
    async with reporting() as reported:
        reported.be_ready()
        await asyncio.sleep(0.5)
        reported.serve(1, 30)
        running = reported.workload.add_job(2, 100.0)
        reported.workload.start(running)
        running.count_generated(40)
        rejected = reported.workload.add_job(3, 7.0)
        reported.workload.end(rejected, Outcome.REJECTED)
        await asyncio.sleep(1)
        state = reported.states[-1]
        assert state["loadtime"] == 12.5
        assert state["max_perf"] == 640.0
        assert state["new_load"] == 130
        assert state["cur_perf"] == 70
        assert state["cur_load"] == 60
        assert state["rej_load"] == 7
        assert state["num_requests_working"] == 1
        assert state["num_requests_recieved"] == 3
        assert state["working_request_idxs"] == [2]


async def test_disk_use_is_reported_in_total_and_as_growth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = [30.0]
    monkeypatch.setattr("api.vast.reporter._disk_used", lambda: used[0])
    async with reporting() as reported:
        await asyncio.sleep(2)
        used[0] = 32.5
        await asyncio.sleep(12)
        await asyncio.sleep(12)
        assert [state["disk_usage"] for state in reported.states] == [30.0, 32.5, 32.5]
        assert [state["additional_disk_usage"] for state in reported.states] == [0.0, 2.5, 0.0]


async def test_each_ended_request_is_reported_with_its_outcome_and_times() -> None:
    async with reporting() as reported:
        await asyncio.sleep(0.25)
        started = [reported.workload.add_job(idx, 10) for idx in (1, 2, 3)]
        waiting, rejected = reported.workload.add_job(4, 10), reported.workload.add_job(5, 10)
        await asyncio.sleep(0.125)
        for job in started:
            reported.workload.start(job)
        await asyncio.sleep(0.25)
        outcomes = [Outcome.SUCCESS, Outcome.ERROR, Outcome.CANCELLED]
        for job, outcome in zip(started, outcomes, strict=True):
            reported.workload.end(job, outcome)
        reported.workload.end(waiting, Outcome.CANCELLED)
        reported.workload.end(rejected, Outcome.REJECTED)
        await asyncio.sleep(2)

        def told(idx: int, success: bool, status: str, work: float, completed: float) -> Any:
            return {
                "request_idx": idx,
                "success": success,
                "status": status,
                "entered_queue_at": EPOCH + 0.25,
                "work_started_at": work,
                "work_completed_at": completed,
            }

        work, done = EPOCH + 0.375, EPOCH + 0.625
        assert reported.deletions == [
            {
                "worker_id": 4242,
                "mtoken": TOKEN,
                "requests": [
                    told(1, True, "Success", work, done),
                    told(2, False, "Error", work, done),
                    told(3, True, "Cancelled", work, 0.0),
                    told(4, True, "Cancelled", 0.0, 0.0),
                    told(5, False, "Rejected", 0.0, 0.0),
                ],
            }
        ]


# -- times ---------------------------------------------------------------------------------


async def test_an_idle_worker_reports_about_every_ten_seconds() -> None:
    async with reporting() as reported:
        await asyncio.sleep(100)
        gaps = [after - before for before, after in pairwise(reported.times)]
        assert all(10 <= gap <= 12 for gap in gaps)
        assert len(gaps) >= 8


async def test_a_change_of_a_request_is_reported_within_a_second() -> None:
    async with reporting() as reported:
        reported.be_ready()
        await asyncio.sleep(3.5)
        served, gone = reported.workload.add_job(1, 5), reported.workload.add_job(2, 5)

        async def is_told() -> None:
            before = len(reported.states)
            await asyncio.sleep(1.01)
            assert len(reported.states) == before + 1

        await is_told()
        reported.workload.start(served)
        reported.workload.start(gone)
        await is_told()
        reported.workload.end(served, Outcome.SUCCESS)
        await is_told()
        reported.workload.end(gone, Outcome.CANCELLED)
        await is_told()
        reported.serve(3, 5)
        await is_told()
        reported.workload.end(reported.workload.add_job(4, 5), Outcome.REJECTED)
        await is_told()


async def test_readiness_is_reported_at_once() -> None:
    async with reporting() as reported:
        await asyncio.sleep(5.25)
        reported.be_ready()
        await asyncio.sleep(0.01)
        assert reported.times[-1] == 5.25
        assert reported.states[-1]["loadtime"] == 12.5


async def test_the_load_time_is_repeated_in_every_report() -> None:
    async with reporting() as reported:
        reported.be_ready()
        await asyncio.sleep(60)
        assert len(reported.states) >= 5
        assert {state["loadtime"] for state in reported.states} == {12.5}
        assert {state["max_perf"] for state in reported.states} == {640.0}


async def test_an_error_and_its_end_are_reported_at_once() -> None:
    async with reporting() as reported:
        await asyncio.sleep(5.25)
        reported.errors.add("engine", "dead: CUDA error")
        await asyncio.sleep(0.5)
        reported.errors.clear("engine")
        await asyncio.sleep(0.5)
        assert reported.times[-2:] == [5.25, 5.75]
        assert [state["error_msg"] for state in reported.states[-2:]] == ["dead: CUDA error", ""]


async def test_a_lasting_error_is_reported_again_and_again() -> None:
    async with reporting() as reported:
        reported.errors.add("load", "out of memory")
        await asyncio.sleep(60)
        assert len(reported.states) >= 5
        assert {state["error_msg"] for state in reported.states} == {"out of memory"}


async def test_the_end_of_one_error_does_not_hide_another() -> None:
    async with reporting() as reported:
        reported.errors.add("certificate", "not signed")
        reported.errors.add("public key", "none")
        reported.errors.clear("certificate")
        await asyncio.sleep(1)
        assert reported.states[-1]["error_msg"] == "none"


async def test_an_error_that_is_added_again_is_reported_once() -> None:
    async with reporting() as reported:
        await asyncio.sleep(2)
        for _ in range(50):
            reported.errors.add("engine", "dead")
            await asyncio.sleep(0.1)
        assert len(reported.states) == 2


# -- addresses ------------------------------------------------------------------------------


async def test_a_report_goes_only_to_the_first_address_that_accepts() -> None:
    async with reporting(FIRST, SECOND) as reported:
        await asyncio.sleep(1.5)
        assert reported.autoscaler.urls() == [f"{FIRST}/worker_status/"]


@pytest.mark.parametrize("answer", [500, 503, 401, 302, httpx2.ConnectError("no route")])
async def test_each_address_has_three_attempts_two_seconds_apart(answer: int | Exception) -> None:
    async with reporting(FIRST, SECOND) as reported:
        reported.autoscaler.answers = {FIRST: [answer]}
        await asyncio.sleep(9)
        assert reported.autoscaler.urls()[:4] == [
            *[f"{FIRST}/worker_status/"] * 3,
            f"{SECOND}/worker_status/",
        ]
        assert reported.times[:3] == [1.0, 3.0, 5.0]


@pytest.mark.parametrize("status", [200, 201, 204])
async def test_any_2xx_status_is_a_delivered_report(status: int) -> None:
    async with reporting() as reported:
        reported.autoscaler.answers = {FIRST: [status]}
        await asyncio.sleep(9)
        assert len(reported.states) == 1


def without_disk(report: dict[str, Any]) -> dict[str, Any]:
    """Leave out the disk figures, since this machine's disk changes during the test."""
    return {name: value for name, value in report.items() if "disk" not in name}


@pytest.mark.parametrize("answer", [500, 404])
@pytest.mark.parametrize("what", ["ready", "error"])
async def test_an_undelivered_change_is_reported_again_soon(answer: int, what: str) -> None:
    """Until the autoscaler knows it, a ready worker gets no requests and a failed one does."""
    async with reporting() as reported:
        await asyncio.sleep(2)
        reported.autoscaler.answers = {FIRST: [*[answer] * 3, 200]}
        if what == "ready":
            reported.be_ready()
        else:
            reported.errors.add("engine", "dead")
        await asyncio.sleep(7.9)
        assert len(reported.states) == 5
        last, before = reported.states[-1], reported.states[-2]
        assert without_disk(last) == without_disk(before)


async def test_a_report_that_is_refused_is_not_repeated_without_a_pause() -> None:
    async with reporting() as reported:
        reported.autoscaler.answers = {FIRST: [404]}
        reported.be_ready()
        await asyncio.sleep(30)
        assert len(reported.states) <= 30


# -- nothing is lost ----------------------------------------------------------------------


async def test_load_that_was_not_delivered_is_in_the_next_report() -> None:
    async with reporting() as reported:
        reported.be_ready()
        reported.autoscaler.answers = {"worker_status": [*[500] * 9, 200]}
        for n in range(30):
            reported.serve(n, 10)
            await asyncio.sleep(1)
        await asyncio.sleep(3)
        delivered = reported.states[9:]
        for name in ("new_load", "cur_perf"):
            assert sum(state[name] for state in delivered) == 300


async def test_load_during_a_report_is_in_the_next_one() -> None:
    async with reporting() as reported:
        reported.be_ready()
        left = list(range(20))

        def during(_: str) -> None:
            if left:
                reported.serve(left.pop(), 10)

        reported.on_request = during
        await asyncio.sleep(30)
        assert not left
        assert sum(state["new_load"] for state in reported.states) == 200
        assert sum(state["cur_perf"] for state in reported.states) == 200
        told = [each["request_idx"] for body in reported.deletions for each in body["requests"]]
        assert sorted(told) == list(range(20))


async def test_ended_requests_are_reported_until_they_are_delivered() -> None:
    async with reporting() as reported:
        reported.autoscaler.answers = {"delete_requests": [*[500] * 4, 200]}
        reported.serve(1, 5)
        await asyncio.sleep(30)
        assert len(reported.deletions) == 5
        assert not reported.workload.ended


async def test_a_retry_that_ends_while_its_first_attempt_is_reported_is_reported_too() -> None:
    """Both attempts have the same number; only the reported one is dropped from the list."""
    async with reporting() as reported:
        reported.workload.end(reported.workload.add_job(9, 5), Outcome.REJECTED)

        def during(url: str) -> None:
            if "delete_requests" in url and len(reported.deletions) == 1:
                reported.serve(9, 5)

        reported.on_request = during
        await asyncio.sleep(5)
        told = [each["status"] for body in reported.deletions for each in body["requests"]]
        assert told == ["Rejected", "Success"]


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_an_older_autoscaler_receives_the_older_format(status: int) -> None:
    async with reporting() as reported:
        reported.autoscaler.answers = {"delete_requests": [status, 200]}
        for idx, outcome in enumerate(Outcome):
            reported.serve(idx, 5, outcome)
        await asyncio.sleep(5)
        worker = {"worker_id": 4242, "mtoken": TOKEN}
        assert reported.deletions[1:] == [
            worker | {"request_idxs": [0, 2], "success": True},
            worker | {"request_idxs": [1, 3], "success": False},
        ]
        assert not reported.workload.ended


async def test_the_older_format_has_no_body_for_an_outcome_that_did_not_occur() -> None:
    async with reporting() as reported:
        reported.autoscaler.answers = {"delete_requests": [404, 200]}
        reported.serve(1, 5)
        await asyncio.sleep(5)
        assert [body["success"] for body in reported.deletions[1:]] == [True]


async def test_a_half_delivered_report_in_the_older_format_is_repeated() -> None:
    async with reporting() as reported:
        reported.autoscaler.answers = {"delete_requests": [404, 200, 500, 500, 500, 200]}
        reported.serve(1, 5)
        reported.serve(2, 5, Outcome.ERROR)
        await asyncio.sleep(20)
        failures = {
            idx
            for body in reported.deletions[5:]
            for idx in [
                *body.get("request_idxs", ()),
                *(r["request_idx"] for r in body.get("requests", ())),
            ]
        }
        assert 2 in failures
        assert not reported.workload.ended


async def test_ended_requests_are_not_reported_to_the_console() -> None:
    async with reporting(CONSOLE, SECOND) as reported:
        reported.serve(1, 5)
        await asyncio.sleep(5)
        assert reported.autoscaler.urls("delete") == [f"{SECOND}/delete_requests/"]


async def test_ended_requests_are_dropped_if_there_is_only_the_console() -> None:
    async with reporting(CONSOLE) as reported:
        reported.serve(1, 5)
        await asyncio.sleep(5)
        assert not reported.autoscaler.urls("delete")
        assert not reported.workload.ended


async def test_undelivered_entries_do_not_hold_up_later_ones() -> None:
    async with reporting() as reported:
        reported.autoscaler.answers = {"delete_requests": [*[500] * 6, 200]}
        reported.errors.add("engine", "dead")
        for n in range(3000):
            reported.serve(n, 1)
        await asyncio.sleep(40)
        assert not reported.workload.ended
        told = [each["request_idx"] for body in reported.deletions[6:] for each in body["requests"]]
        assert sorted(told) == list(range(3000))


async def test_closing_reports_what_is_left() -> None:
    async with reporting() as reported:
        await asyncio.sleep(1.5)
    reported.serve(1, 5)
    await reported.reporter.close()
    assert reported.deletions[-1]["requests"][0]["request_idx"] == 1
    assert reported.states[-1]["cur_perf"] == 5


async def test_closing_gives_up_soon_if_nothing_is_delivered() -> None:
    async def never(_: httpx2.Request) -> httpx2.Response:
        await asyncio.Event().wait()
        raise AssertionError

    reported = Reported((FIRST,))
    reported.reporter._http = httpx2.AsyncClient(transport=httpx2.MockTransport(never))
    reported.serve(1, 5)
    before = now()
    await reported.reporter.close()
    assert now() - before <= 5
