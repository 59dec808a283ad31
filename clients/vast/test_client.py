"""`vastai`'s client against Skiff as a worker, and against Vast's stock worker in front of it."""

import asyncio
import ssl
from typing import Any

import httpx2
import pytest

from clients.vast.conftest import skiff_only
from clients.vast.standin import StandIn
from clients.vast.workers import MASTER_TOKEN, Worker
from clients.wire import MESSAGES, PROMPT

pytestmark = pytest.mark.anyio


def payload(max_new_tokens: int, **parameters: Any) -> dict[str, Any]:
    return {"inputs": PROMPT, "parameters": {"max_new_tokens": max_new_tokens} | parameters}


async def generate(endpoint: Any, max_new_tokens: int, route: str = "/generate") -> Any:
    """Send a request whose cost is the worker's workload, as Vast's documentation says."""
    return await endpoint.request(route, payload(max_new_tokens), cost=max_new_tokens)


async def stream(endpoint: Any, route: str, body: dict[str, Any], cost: int) -> list[Any]:
    answer = await endpoint.request(route, body, cost=cost, stream=True)
    assert answer["ok"]
    return [event async for event in answer["response"]]


def text_of(events: list[Any]) -> str:
    return "".join(event["token"]["text"] for event in events)


async def test_an_answer_is_an_object_with_the_text(endpoint: Any) -> None:
    answer = await generate(endpoint, 8)
    assert (answer["ok"], answer["status"]) == (True, 200)
    assert set(answer["response"]) == {"generated_text"}
    assert "Paris" in answer["response"]["generated_text"]


async def test_a_stream_is_the_answer_token_by_token(endpoint: Any) -> None:
    whole = await generate(endpoint, 8)
    events = await stream(endpoint, "/generate_stream", payload(8), 8)
    assert [event["index"] for event in events] == list(range(1, 9))
    assert [event["generated_text"] for event in events[:-1]] == [None] * 7
    assert events[-1]["generated_text"] == text_of(events) == whole["response"]["generated_text"]


async def test_the_result_carries_what_the_request_was_sent_with(
    endpoint: Any, worker: Worker, vast: StandIn
) -> None:
    answer = await generate(endpoint, 3)
    assert answer["url"] == worker.url
    assert vast.settled() == []
    (entry,) = vast.deletions_of(answer["request_idx"])
    assert entry["status"] == "Success"
    work_s = entry["work_completed_at"] - entry["work_started_at"]
    assert 0 < work_s <= answer["latency"]


@skiff_only
@pytest.mark.parametrize("route", ["/generate/", "/generate"])
async def test_a_route_with_a_trailing_slash_is_the_same(endpoint: Any, route: str) -> None:
    answer = await generate(endpoint, 8, route)
    assert "Paris" in answer["response"]["generated_text"]
    events = await stream(endpoint, route.replace("generate", "generate_stream"), payload(8), 8)
    assert text_of(events) == answer["response"]["generated_text"]


@skiff_only
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/chat/completions/"])
async def test_chats_are_answered(endpoint: Any, route: str) -> None:
    body = {"model": "tgi", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    answer = await endpoint.request(route, body, cost=8)
    text = answer["response"]["choices"][0]["message"]["content"]
    chunks = await stream(endpoint, route, body | {"stream": True}, 8)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert text
    assert "".join(delta.get("content") or "" for delta in deltas) == text


async def test_many_concurrent_requests_are_all_answered(endpoint: Any) -> None:
    answers = await asyncio.gather(*(generate(endpoint, n) for n in range(1, 9)))
    assert all(answer["ok"] for answer in answers)
    assert len({answer["request_idx"] for answer in answers}) == 8


async def test_an_invalid_request_is_refused_without_retries(endpoint: Any, vast: StandIn) -> None:
    """The client would retry some other statuses for ever."""
    answer = await endpoint.request("/generate", payload(4, temperature=-1.0), cost=4)
    assert (answer["ok"], answer["status"]) == (False, 422)
    assert answer["response"]["error_type"] == "validation"
    vast.unused += 4
    attempts = vast.ledger()["attempts"]
    assert [x["request_idx"] for x in attempts].count(answer["request_idx"]) == 1


async def test_an_invalid_streamed_request_is_refused_in_the_stream(
    endpoint: Any, vast: StandIn
) -> None:
    (event,) = await stream(endpoint, "/generate_stream", payload(4, temperature=-1.0), 4)
    assert event["error_type"] == "validation"
    vast.unused += 4


async def test_a_client_that_goes_away_is_a_cancelled_request(endpoint: Any, vast: StandIn) -> None:
    before = len(vast.ledger()["attempts"])
    request = endpoint.request("/generate", payload(400), cost=400)
    while request.status != "In Progress":
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    request.cancel()
    await asyncio.sleep(0)
    assert await asyncio.to_thread(vast.settled) == []
    attempt = vast.ledger()["attempts"][before]
    (entry,) = vast.deletions_of(attempt["request_idx"])
    assert entry["status"] == "Cancelled"


async def test_an_abandoned_stream_is_a_cancelled_request(endpoint: Any, vast: StandIn) -> None:
    answer = await endpoint.request("/generate_stream", payload(400), cost=400, stream=True)
    async for event in answer["response"]:
        assert event["index"] == 1
        break
    await endpoint.client.close()
    assert await asyncio.to_thread(vast.settled) == []
    (entry,) = vast.deletions_of(answer["request_idx"])
    assert entry["status"] == "Cancelled"


async def test_a_session_is_created_used_and_ended(endpoint: Any, vast: StandIn) -> None:
    async with await endpoint.session(cost=5, lifetime=30) as session:
        assert len(session.session_id) == 13
        assert await session.is_open()
        answer = await session.request("/generate", payload(4), cost=4)
        assert "generated_text" in answer["response"]
        vast.in_sessions += 4
        assert not vast.deletions_of(session.auth_data["request_idx"])
    late = await endpoint.request("/generate", payload(4), cost=4, session=session)
    assert (late["status"], late["response"]) == (410, {"error": "invalid session"})
    with pytest.raises(Exception, match="session does not exist"):
        await session.is_open()
    assert await asyncio.to_thread(vast.settled) == []
    (entry,) = vast.deletions_of(session.auth_data["request_idx"])
    assert entry["status"] == "Success"


async def test_a_stream_inside_a_session_is_a_stream(endpoint: Any, vast: StandIn) -> None:
    async with await endpoint.session(cost=5) as session:
        answer = await session.request("/generate_stream", payload(4), stream=True)
        events = [event async for event in answer["response"]]
        assert len(events) == 4
        vast.in_sessions += 4


async def test_a_session_that_is_not_ended_expires(endpoint: Any, vast: StandIn) -> None:
    session = await endpoint.session(cost=5, lifetime=1)
    assert await asyncio.to_thread(vast.settled) == []
    late = await endpoint.request("/generate", payload(4), session=session)
    assert late["status"] == 410


async def test_workers_are_listed(endpoint: Any) -> None:
    (listed,) = await endpoint.get_workers()
    assert (listed.id, listed.status) == (4242, "ready")
    assert listed.perf > 0


def post(worker: Worker, route: str, body: Any, verify: Any = False) -> httpx2.Response:
    return httpx2.post(f"{worker.url}{route}", json=body, verify=verify, timeout=60)


@skiff_only
async def test_a_request_that_vast_did_not_sign_leaves_no_trace(
    worker: Worker, vast: StandIn
) -> None:
    """Vast's stock worker reports it as rejected load, under another request's number."""
    body = vast.envelope(payload(6))
    assert post(worker, "/generate", body).status_code == 200
    forged = body | {"auth_data": body["auth_data"] | {"url": "https://127.0.0.2:1"}}
    answer = post(worker, "/generate", forged)
    assert (answer.status_code, answer.content) == (401, b"")
    assert vast.settled() == []
    (entry,) = vast.deletions_of(body["auth_data"]["request_idx"])
    assert entry["status"] == "Success"


@pytest.mark.usefixtures("vast")
@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, {"auth_data": "field missing", "payload": "field missing"}),
        ({"payload": {}}, {"auth_data": "field missing"}),
        (payload(4), {"auth_data": "field missing", "payload": "field missing"}),
    ],
    ids=["nothing", "no-auth_data", "bare"],
)
async def test_a_body_without_an_envelope_is_refused_and_not_counted(
    worker: Worker, body: Any, told: Any
) -> None:
    answer = post(worker, "/generate", body)
    assert (answer.status_code, answer.json()) == (422, told)


@skiff_only
@pytest.mark.parametrize("form", ["A", "B", "C1"])
async def test_signatures_of_every_generation_are_accepted(
    endpoint: Any, vast: StandIn, form: str
) -> None:
    vast.control("sign_as", form=form)
    try:
        assert (await generate(endpoint, 2))["ok"]
    finally:
        vast.control("sign_as", form="C2")


async def test_a_worker_reports_one_load_time_in_every_report(
    worker: Worker, vast: StandIn
) -> None:
    reports = vast.reports()
    loadtimes = [report["loadtime"] for report in reports]
    first = next(number for number, loadtime in enumerate(loadtimes) if loadtime)
    assert len(set(loadtimes[first:])) == 1
    assert {report["url"] for report in reports} == {worker.url}
    assert {report["mtoken"] for report in reports} == {MASTER_TOKEN}
    assert {report["error_msg"] for report in reports} == {""}


@skiff_only
async def test_the_worker_has_a_certificate_signed_by_vast(worker: Worker, vast: StandIn) -> None:
    assert vast.ledger()["certificate_requests"] == [4242]
    trusting = ssl.create_default_context(
        cadata=httpx2.get(f"{vast.url}/static/jvastai_root.cer").text
    )
    trusting.verify_flags &= ~ssl.VERIFY_X509_STRICT  # as the client does, for Vast's root
    assert post(worker, "/generate", {}, trusting).status_code == 422
    with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        post(worker, "/generate", {}, ssl.create_default_context())
