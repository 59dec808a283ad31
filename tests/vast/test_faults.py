"""The autoscaler in trouble, and strangers at the gate: what a worker and its books make of it.

The worker is a process, and the autoscaler listens on this machine. At the end the books balance
at the autoscaler: what was received was served, cancelled, failed or rejected, and each attempt was
told done once.
"""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.thorough import THOROUGH
from tests.vast.autoscaler import Autoscaler, running
from tests.vast.signing import Signer
from tests.vast.worker import NUM_TOKENS, WorkerProcess, scripted_worker

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.thorough]
READY_S = 30.0
DOWN_S = 60 if THOROUGH > 1 else 4
PAYLOAD = {"inputs": "x", "parameters": {"max_new_tokens": NUM_TOKENS}}


@pytest.fixture
def autoscaler() -> Iterator[Autoscaler]:
    with running() as listening:
        yield listening


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def worker(autoscaler: Autoscaler, tmp_path: Path, port: int) -> Iterator[WorkerProcess]:
    with scripted_worker(autoscaler, tmp_path, port) as process:
        autoscaler.wait_until_ready(READY_S)
        yield process


@pytest.fixture
async def http() -> Any:
    async with httpx2.AsyncClient(timeout=30) as client:
        yield client


async def ask(http: httpx2.AsyncClient, worker: WorkerProcess, envelope: object) -> int:
    return (await http.post(f"{worker.url}/generate", json=envelope)).status_code


async def ask_many(
    http: httpx2.AsyncClient, worker: WorkerProcess, autoscaler: Autoscaler, count: int
) -> Counter[int]:
    envelopes = [autoscaler.envelope(PAYLOAD) for _ in range(count)]
    return Counter(await asyncio.gather(*(ask(http, worker, e) for e in envelopes)))


async def settled(autoscaler: Autoscaler, timeout_s: float = 20.0) -> list[str]:
    return await asyncio.to_thread(autoscaler.settled, timeout_s)


async def test_an_autoscaler_that_is_down_at_start_hears_of_it_when_it_is_up(
    autoscaler: Autoscaler, tmp_path: Path, port: int, http: httpx2.AsyncClient
) -> None:
    autoscaler.down(6.0)
    with scripted_worker(autoscaler, tmp_path, port) as worker:
        await asyncio.sleep(5.0)
        assert autoscaler.books.reports == []
        await asyncio.to_thread(autoscaler.wait_until_ready, READY_S)
        assert await ask(http, worker, autoscaler.envelope(PAYLOAD)) == 200
        assert await settled(autoscaler) == []


async def test_nothing_is_lost_while_it_is_down_under_load(
    autoscaler: Autoscaler, worker: WorkerProcess, http: httpx2.AsyncClient
) -> None:
    rounds = DOWN_S + 1  # a second each
    envelopes = [[autoscaler.envelope(PAYLOAD) for _ in range(10)] for _ in range(rounds)]
    autoscaler.down(float(DOWN_S))
    answers: Counter[int] = Counter()
    for together in envelopes:
        answers.update(await asyncio.gather(*(ask(http, worker, e) for e in together)))
    assert answers == {200: rounds * 10}
    assert await settled(autoscaler) == []


@pytest.mark.parametrize("fault", ["slow", "500"])
async def test_a_bad_day_of_the_autoscaler_is_none_of_the_clients(
    fault: str, autoscaler: Autoscaler, worker: WorkerProcess, http: httpx2.AsyncClient
) -> None:
    for route in ("worker_status", "delete_requests"):
        if fault == "slow":
            autoscaler.slow(route, 3.0)
        else:
            autoscaler.fail(route, 500, times=2)
    started = asyncio.get_running_loop().time()
    assert await ask_many(http, worker, autoscaler, 20) == {200: 20}
    assert asyncio.get_running_loop().time() - started < 3.0
    autoscaler.heal()
    assert await settled(autoscaler) == []


async def test_clients_that_go_away_are_told_as_cancelled(
    autoscaler: Autoscaler, worker: WorkerProcess, http: httpx2.AsyncClient
) -> None:
    with pytest.raises(httpx2.ReadTimeout):
        await http.post(f"{worker.url}/generate", json=autoscaler.envelope(PAYLOAD), timeout=0.3)
    stream = f"{worker.url}/generate_stream"
    async with http.stream("POST", stream, json=autoscaler.envelope(PAYLOAD)) as answer:
        await anext(answer.aiter_lines())
    assert await settled(autoscaler) == []
    assert [entry.status for entry in autoscaler.books.deletions] == ["Cancelled"] * 2


@pytest.mark.parametrize("form", ["A", "B", "C1", "C2"])
async def test_envelopes_of_every_generation_are_served(
    form: str, autoscaler: Autoscaler, worker: WorkerProcess, http: httpx2.AsyncClient
) -> None:
    autoscaler.sign_as(form)
    assert await ask_many(http, worker, autoscaler, 3) == {200: 3}
    if form != "A":  # which is told of no request's end
        assert await settled(autoscaler) == []


async def test_a_key_that_is_replaced_refuses_nobody(
    autoscaler: Autoscaler, worker: WorkerProcess, http: httpx2.AsyncClient
) -> None:
    signed_before = autoscaler.envelope(PAYLOAD)
    await asyncio.sleep(5.1)  # the worker has just seen the key that is replaced
    autoscaler.rotate_key()
    assert await ask_many(http, worker, autoscaler, 10) == {200: 10}
    assert await ask(http, worker, signed_before) == 200
    assert await settled(autoscaler) == []


async def test_a_worker_that_has_no_key_says_so_and_is_ready_when_it_has(
    autoscaler: Autoscaler, tmp_path: Path, port: int, http: httpx2.AsyncClient
) -> None:
    autoscaler.serve_key("page")
    with scripted_worker(autoscaler, tmp_path, port) as worker:
        missing = "Failed to get Serverless public key after all retry attempts"
        await asyncio.to_thread(
            autoscaler.wait_for,
            lambda: any(r.body["error_msg"] == missing for r in autoscaler.books.reports),
            40.0,
        )
        autoscaler.heal()
        await asyncio.to_thread(autoscaler.wait_until_ready, READY_S)
        assert await ask(http, worker, autoscaler.envelope(PAYLOAD)) == 200
        assert await settled(autoscaler) == []


async def test_a_wrong_key_opens_to_nobody_and_is_replaced(
    autoscaler: Autoscaler, tmp_path: Path, port: int, http: httpx2.AsyncClient
) -> None:
    autoscaler.serve_key("wrong")
    with scripted_worker(autoscaler, tmp_path, port) as worker:
        await asyncio.to_thread(autoscaler.wait_until_ready, READY_S)
        envelope = autoscaler.envelope(PAYLOAD)
        assert await ask(http, worker, envelope) == 401
        autoscaler.heal()
        await asyncio.sleep(5.1)  # no key is asked for more often
        assert await ask(http, worker, envelope) == 200
        assert await settled(autoscaler) == []


async def test_a_flood_of_forgeries_opens_nothing_and_closes_nothing(
    autoscaler: Autoscaler, worker: WorkerProcess, http: httpx2.AsyncClient
) -> None:
    """Replayed, tampered with, forged: 2,000 beside real ones, as fast as they are answered."""
    autoscaler.sign_as("B")
    taken = [autoscaler.envelope(PAYLOAD) for _ in range(5)]
    assert {await ask(http, worker, envelope) for envelope in taken} == {200}
    forgeries = [*taken, *(forged for envelope in taken for forged in forged_from(envelope))]

    async def flood(statuses: Counter[int], first: int) -> None:
        for n in range(first, 2000, 8):
            statuses[await ask(http, worker, forgeries[n % len(forgeries)])] += 1

    statuses: Counter[int] = Counter()
    flooding = asyncio.gather(*(flood(statuses, first) for first in range(8)))
    for _ in range(3):
        assert await ask_many(http, worker, autoscaler, 10) == {200: 10}
    await flooding
    assert statuses == {401: 2000}
    assert await settled(autoscaler) == []
    assert len(autoscaler.books.deletions) == 35
    assert not any(report.number("rej_load") for report in autoscaler.books.reports)


def forged_from(envelope: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Everything in a signed envelope that is signed, changed; and a stranger's signature."""
    auth = envelope["auth_data"]
    for name, value in {
        "cost": 1,
        "endpoint": "another",
        "reqnum": 10_000,
        "request_idx": 10_000,
        "url": "http://another",
    }.items():
        yield envelope | {"auth_data": auth | {name: value}}
    yield envelope | {"auth_data": auth | {"signature": Signer().sign("B", auth)}}


async def test_no_secret_reaches_the_log(
    autoscaler: Autoscaler, worker: WorkerProcess, http: httpx2.AsyncClient
) -> None:
    envelope = autoscaler.envelope({"inputs": "my-prompt", "parameters": {"max_new_tokens": 1}})
    answer = await http.post(
        f"{worker.url}/generate?api_key=my-endpoint-key",
        json=envelope,
        headers={"authorization": "Bearer my-endpoint-key"},
    )
    assert answer.status_code == 200
    forged = json.loads(json.dumps(envelope).replace("http://", "https://"))
    assert await ask(http, worker, forged) == 401
    for secret in ("my-prompt", "my-endpoint-key", envelope["auth_data"]["signature"][:20]):
        assert secret not in worker.said()
