"""A worker whose engine dies is started again: the autoscaler's books add up, and the instance is
never in error.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.api.faulty import START_S, FaultyServer, faulty_server
from tests.vast.autoscaler import Autoscaler
from tests.vast.ledger import Report
from tests.vast.worker import worker_environment

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.thorough]
SHORT = {"inputs": "x", "parameters": {"max_new_tokens": 3}}
LONG = {"inputs": "x", "parameters": {"max_new_tokens": 1500}}
SETTLED_S = 40.0


@contextmanager
def faulty_worker(
    autoscaler: Autoscaler, folder: Path, port: int, *flags: str
) -> Iterator[FaultyServer]:
    environment = worker_environment(autoscaler, folder, port)
    with faulty_server(folder, *flags, environment=environment) as worker:
        yield worker


@pytest.fixture
def worker(autoscaler: Autoscaler, tmp_path: Path, port: int) -> Iterator[FaultyServer]:
    with faulty_worker(autoscaler, tmp_path, port) as process:
        autoscaler.wait_until_ready(START_S)
        yield process


@pytest.fixture
async def http(port: int) -> Any:
    async with httpx2.AsyncClient(timeout=60, base_url=f"http://127.0.0.1:{port}") as client:
        yield client


async def ask(http: httpx2.AsyncClient, envelope: object) -> int:
    try:
        return (await http.post("/generate", json=envelope)).status_code
    except httpx2.TransportError:
        return 0


async def in_flight(
    autoscaler: Autoscaler, http: httpx2.AsyncClient, count: int = 5
) -> list["asyncio.Task[int]"]:
    """Send requests that do not end, and wait until they are reported to be running."""
    tasks = [asyncio.create_task(ask(http, autoscaler.envelope(LONG))) for _ in range(count)]
    await asyncio.to_thread(
        autoscaler.wait_for,
        lambda: autoscaler.ledger.reports[-1].number("num_requests_working") == count,
        START_S,
    )
    return tasks


async def is_back(autoscaler: Autoscaler, times: int = 2) -> None:
    """Wait for the report of the start number `times`."""
    await asyncio.to_thread(
        autoscaler.wait_for, lambda: len(autoscaler.ledger.loadtimes(42)) == times, START_S
    )


async def settled(autoscaler: Autoscaler) -> list[str]:
    return await asyncio.to_thread(autoscaler.settled, SETTLED_S)


def states(reports: list[Report]) -> list[str]:
    """Return `loading`, `ready` or the error, each as long as it lasts once."""
    told = [
        report.body["error_msg"] or ("ready" if report.loaded else "loading") for report in reports
    ]
    return [state for n, state in enumerate(told) if n == 0 or told[n - 1] != state]


def statuses(autoscaler: Autoscaler) -> Counter[str | None]:
    return Counter(entry.status for entry in autoscaler.ledger.deletions)


@pytest.mark.parametrize(("fault", "status"), [("die", 424), ("crash", 0), ("kill", 0)])
async def test_a_worker_that_died_is_loading_again_and_no_request_is_lost(
    fault: str,
    status: int,
    autoscaler: Autoscaler,
    worker: FaultyServer,
    http: httpx2.AsyncClient,
) -> None:
    assert await ask(http, autoscaler.envelope(SHORT)) == 200
    lost = await in_flight(autoscaler, http)
    worker.obey(fault)
    assert [await task for task in lost] == [status] * 5
    await is_back(autoscaler)
    assert [await ask(http, autoscaler.envelope(SHORT)) for _ in range(2)] == [200] * 2
    assert await settled(autoscaler) == []
    assert statuses(autoscaler) == {"Success": 3, "Error": 5}
    assert set(states(autoscaler.ledger.reports)) <= {"loading", "ready"}
    if (
        fault == "die"
    ):  # it says so itself; after a crash the next one may be ready at its first word
        assert states(autoscaler.ledger.reports)[-3:] == ["ready", "loading", "ready"]
    assert worker.said.count("measured at an earlier start") == 1
    received = [report.number("num_requests_recieved") for report in autoscaler.ledger.reports]
    assert received == sorted(received)


async def test_a_worker_whose_step_hangs_is_loading_and_never_in_error(
    autoscaler: Autoscaler, tmp_path: Path, port: int, http: httpx2.AsyncClient
) -> None:
    """It is no longer sent requests as soon as it stalls, long before it is given up."""
    flags = ("--stall-timeout", "1", "--watchdog-timeout", "6")
    with faulty_worker(autoscaler, tmp_path, port, *flags) as worker:
        await asyncio.to_thread(autoscaler.wait_until_ready, START_S)
        lost = await in_flight(autoscaler, http)
        worker.obey("hang")
        await asyncio.to_thread(
            autoscaler.wait_for, lambda: not autoscaler.ledger.reports[-1].loaded, START_S
        )
        assert not any(task.done() for task in lost)
        assert [await task for task in lost] == [424] * 5
        await is_back(autoscaler)
        assert await ask(http, autoscaler.envelope(SHORT)) == 200
        assert await settled(autoscaler) == []
        assert states(autoscaler.ledger.reports)[-3:] == ["ready", "loading", "ready"]
        assert set(states(autoscaler.ledger.reports)) == {"loading", "ready"}


@pytest.mark.parametrize("fault", ["die", "crash"])
async def test_what_could_not_be_reported_is_reported_by_the_next(
    fault: str, autoscaler: Autoscaler, worker: FaultyServer, http: httpx2.AsyncClient
) -> None:
    lost = await in_flight(autoscaler, http)
    envelope = autoscaler.envelope(SHORT)
    autoscaler.down(8.0)
    assert await ask(http, envelope) == 200
    await asyncio.sleep(0.5)
    worker.obey(fault)
    await asyncio.gather(*lost)
    await is_back(autoscaler)
    assert await settled(autoscaler) == []
    assert statuses(autoscaler) == {"Success": 1, "Error": 5}


@pytest.mark.parametrize("form", ["A", "B", "C2"])
async def test_an_envelope_is_accepted_once_also_over_a_restart(
    form: str, autoscaler: Autoscaler, worker: FaultyServer, http: httpx2.AsyncClient
) -> None:
    autoscaler.sign_as(form)
    used = autoscaler.envelope(SHORT)
    assert await ask(http, used) == 200
    lost = await in_flight(autoscaler, http, 1)
    worker.obey("die")
    await asyncio.gather(*lost)
    await is_back(autoscaler)
    assert await ask(http, used) == (200 if form == "C2" else 401)
    assert await ask(http, autoscaler.envelope(SHORT)) == 200


async def test_sessions_of_a_worker_that_died_are_over(
    autoscaler: Autoscaler, worker: FaultyServer, http: httpx2.AsyncClient
) -> None:
    opened = await http.post("/session/create", json=autoscaler.envelope({"lifetime": 60}, 50))
    assert opened.status_code == 201
    inside = autoscaler.envelope(LONG) | {"session_id": opened.json()["session_id"]}
    autoscaler.ledger.attempts.pop()  # requests in a session are not reported
    lost = asyncio.create_task(ask(http, inside))
    await asyncio.sleep(1)
    worker.obey("crash")
    assert await lost == 0
    await is_back(autoscaler)
    assert await ask(http, inside) == 410
    await asyncio.to_thread(autoscaler.wait_for, lambda: autoscaler.ledger.deletions, START_S)
    assert statuses(autoscaler) == {"Error": 1}
    assert autoscaler.ledger.reports[-1].number("cur_load") == 0


async def test_a_worker_that_crashes_while_it_starts_reports_an_error_until_it_is_stopped(
    autoscaler: Autoscaler, tmp_path: Path, port: int
) -> None:
    (tmp_path / "told").write_text("crash")
    with faulty_worker(autoscaler, tmp_path, port) as worker:
        await asyncio.to_thread(
            autoscaler.wait_for, lambda: "signal 11" in _last_error(autoscaler), START_S
        )
        assert worker.process.poll() is None
        worker.process.terminate()
        assert worker.end() == 0
    assert not any(report.loaded for report in autoscaler.ledger.reports)


async def test_without_a_supervisor_the_last_report_says_that_the_engine_is_dead(
    autoscaler: Autoscaler, tmp_path: Path, port: int, http: httpx2.AsyncClient
) -> None:
    """Nothing is known to start it again, and a silent worker is billed as one that loads."""
    with faulty_worker(autoscaler, tmp_path, port, "--no-supervise") as worker:
        await asyncio.to_thread(autoscaler.wait_until_ready, START_S)
        lost = await in_flight(autoscaler, http, 1)
        worker.obey("die")
        assert await lost[0] == 424
        assert worker.end() == 86
        assert _last_error(autoscaler).startswith("dead: CUDA error")


def _last_error(autoscaler: Autoscaler) -> str:
    reports = autoscaler.ledger.reports
    return str(reports[-1].body["error_msg"]) if reports else ""
