"""A worker process under faults of the autoscaler and under forged requests.

At the end of each test the autoscaler's ledger must add up: all received load was served,
cancelled, failed or rejected, and each attempt was reported once as ended.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.thorough import THOROUGH
from tests.vast.autoscaler import Autoscaler
from tests.vast.signing import Signer
from tests.vast.worker import NUM_TOKENS, WorkerProcess, scripted_worker

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.thorough]
READY_S = 30.0
DOWN_S = 60 if THOROUGH > 1 else 4
PAYLOAD = {"inputs": "x", "parameters": {"max_new_tokens": NUM_TOKENS}}


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


async def test_a_worker_reports_to_an_autoscaler_that_was_down_at_its_start(
    autoscaler: Autoscaler, tmp_path: Path, port: int, http: httpx2.AsyncClient
) -> None:
    autoscaler.down(6.0)
    with scripted_worker(autoscaler, tmp_path, port) as worker:
        await asyncio.sleep(5.0)
        assert autoscaler.ledger.reports == []
        await asyncio.to_thread(autoscaler.wait_until_ready, READY_S)
        assert await ask(http, worker, autoscaler.envelope(PAYLOAD)) == 200
        assert await settled(autoscaler) == []


async def test_no_load_is_lost_while_the_autoscaler_is_down(
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
async def test_faults_of_the_autoscaler_do_not_delay_clients(
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


async def test_clients_that_go_away_are_reported_as_cancelled(
    autoscaler: Autoscaler, worker: WorkerProcess, http: httpx2.AsyncClient
) -> None:
    with pytest.raises(httpx2.ReadTimeout):
        await http.post(f"{worker.url}/generate", json=autoscaler.envelope(PAYLOAD), timeout=0.3)
    stream = f"{worker.url}/generate_stream"
    async with http.stream("POST", stream, json=autoscaler.envelope(PAYLOAD)) as answer:
        await anext(answer.aiter_lines())
    assert await settled(autoscaler) == []
    assert [entry.status for entry in autoscaler.ledger.deletions] == ["Cancelled"] * 2


@pytest.mark.parametrize("form", ["A", "B", "C1", "C2"])
async def test_envelopes_of_every_generation_are_served(
    form: str, autoscaler: Autoscaler, worker: WorkerProcess, http: httpx2.AsyncClient
) -> None:
    autoscaler.sign_as(form)
    assert await ask_many(http, worker, autoscaler, 3) == {200: 3}
    if form != "A":  # its autoscaler receives no ended requests
        assert await settled(autoscaler) == []


async def test_no_request_is_refused_while_the_key_is_replaced(
    autoscaler: Autoscaler, worker: WorkerProcess, http: httpx2.AsyncClient
) -> None:
    signed_before = autoscaler.envelope(PAYLOAD)
    await asyncio.sleep(5.1)  # a key fetched less than 5 s ago is not fetched again
    autoscaler.rotate_key()
    assert await ask_many(http, worker, autoscaler, 10) == {200: 10}
    assert await ask(http, worker, signed_before) == 200
    assert await settled(autoscaler) == []


async def test_a_worker_without_a_key_reports_it_and_is_ready_once_it_has_one(
    autoscaler: Autoscaler, tmp_path: Path, port: int, http: httpx2.AsyncClient
) -> None:
    autoscaler.serve_key("page")
    with scripted_worker(autoscaler, tmp_path, port) as worker:
        missing = "Failed to get Serverless public key after all retry attempts"
        await asyncio.to_thread(
            autoscaler.wait_for,
            lambda: any(r.body["error_msg"] == missing for r in autoscaler.ledger.reports),
            40.0,
        )
        autoscaler.heal()
        await asyncio.to_thread(autoscaler.wait_until_ready, READY_S)
        assert await ask(http, worker, autoscaler.envelope(PAYLOAD)) == 200
        assert await settled(autoscaler) == []


async def test_a_wrong_public_key_admits_no_request_and_is_replaced(
    autoscaler: Autoscaler, tmp_path: Path, port: int, http: httpx2.AsyncClient
) -> None:
    autoscaler.serve_key("wrong")
    with scripted_worker(autoscaler, tmp_path, port) as worker:
        await asyncio.to_thread(autoscaler.wait_until_ready, READY_S)
        envelope = autoscaler.envelope(PAYLOAD)
        assert await ask(http, worker, envelope) == 401
        autoscaler.heal()
        await asyncio.sleep(5.1)  # a key fetched less than 5 s ago is not fetched again
        assert await ask(http, worker, envelope) == 200
        assert await settled(autoscaler) == []


async def test_a_flood_of_forged_requests_is_401_and_does_not_block_others(
    autoscaler: Autoscaler, worker: WorkerProcess, http: httpx2.AsyncClient
) -> None:
    """Send 2,000 replayed, altered and forged requests as fast as possible, beside real ones."""
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
    assert len(autoscaler.ledger.deletions) == 35
    assert not any(report.number("rej_load") for report in autoscaler.ledger.reports)


def forged_from(envelope: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield copies with one signed field changed each, and one signed by another key."""
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
        assert secret not in worker.output()
