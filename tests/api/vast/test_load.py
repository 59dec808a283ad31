"""The load of requests: tokens pending and served as they are generated, and each outcome."""

import asyncio
import math
from typing import Any

import httpx2
import pytest

from api.vast.workload import Workload
from engine.core.request import Event, Failed
from tests.api.client import Connection, until
from tests.api.scripted import HOLD, ScriptedEngine, finished, output
from tests.api.vast.worker import PAYLOAD, Worker, worker

pytestmark = pytest.mark.anyio

CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8}
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("/generate", PAYLOAD),
    "streamed": ("/generate_stream", PAYLOAD),
    "chat": ("/v1/chat/completions", CHAT),
    "chat streamed": ("/v1/chat/completions", CHAT | {"stream": True}),
}
EACH_ROUTE = pytest.mark.parametrize(("path", "payload"), ROUTES.values(), ids=ROUTES)
STREAMS = pytest.mark.parametrize(
    ("path", "payload"), [ROUTES["streamed"], ROUTES["chat streamed"]], ids=["tgi", "openai"]
)


def connect(served: Worker, path: str, payload: object, **fields: Any) -> Connection:
    app: Any = served.app
    return Connection(app, path, served.envelope(payload), **fields)


def figures(workload: Workload) -> tuple[float, float, float, float]:
    load = workload.load()
    return load.received, load.served, load.pending, load.rejected


@EACH_ROUTE
async def test_a_request_is_load_of_its_limit_and_each_token_is_served(
    path: str, payload: Any
) -> None:
    engine = ScriptedEngine(lambda _: [[output("a")], [output("b"), output("c")], HOLD])
    async with worker(engine) as served:
        connection = connect(served, path, payload)
        await until(engine.holding.is_set)
        assert figures(served.workload) == (8, 3, 5, 0)
        assert served.workload.load().working == (42,)
        await connection.go_away()


@EACH_ROUTE
async def test_a_request_that_ends_early_gives_the_rest_back(path: str, payload: Any) -> None:
    async with worker() as served:
        assert (await served.ask(payload, path)).status_code == 200
        assert figures(served.workload) == (2, 2, 0, 0)
        assert served.workload.load().working == ()
        assert served.outcomes() == [(42, "Success")]


async def test_all_generations_of_one_request_are_load() -> None:
    engine = ScriptedEngine(lambda _: [[output("a")], HOLD])
    async with worker(engine) as served:
        parameters = {"max_new_tokens": 8, "best_of": 2, "do_sample": True}
        connection = connect(served, "/generate", {"inputs": "x", "parameters": parameters})
        await until(engine.holding.is_set)
        assert figures(served.workload) == (16, 1, 15, 0)
        await connection.go_away()
        assert served.outcomes() == [(42, "Cancelled")]


async def test_a_request_without_a_limit_is_load_of_what_it_may_generate() -> None:
    engine = ScriptedEngine(lambda _: [HOLD])
    async with worker(engine) as served:
        connection = connect(served, "/generate", {"inputs": "x"})
        await until(engine.holding.is_set)
        limit = engine.requests[0].stopping.max_new_tokens
        assert figures(served.workload) == (limit, 0, limit, 0)
        await connection.go_away()


async def test_a_request_before_validation_is_load_of_its_declared_tokens() -> None:
    engine = ScriptedEngine()
    engine.tokenizer.gate.clear()
    async with worker(engine) as served:
        connection = connect(served, "/generate", PAYLOAD)
        await until(lambda: bool(served.workload.working))
        assert figures(served.workload) == (8, 0, 8, 0)
        engine.tokenizer.gate.set()
        await connection.finished()


# -- 429 ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("wait_s", "status"), [(0.0, 200), (60.0, 200), (60.1, 429)])
async def test_a_queue_time_over_the_limit_is_429(wait_s: float, status: int) -> None:
    async with worker(wait_s=lambda: wait_s) as served:
        assert (await served.ask()).status_code == status


async def test_without_a_queue_time_limit_a_long_queue_is_accepted() -> None:
    async with worker(wait_s=lambda: 1e9, max_queue_time_s=None) as served:
        assert (await served.ask()).status_code == 200


async def test_without_a_queue_time_limit_a_full_worker_still_answers_429() -> None:
    async with worker(wait_s=lambda: math.inf, max_queue_time_s=None) as served:
        assert (await served.ask(path="/generate_stream")).status_code == 429


async def test_a_queue_time_limit_of_zero_serves_requests_that_need_not_wait() -> None:
    waits = [0.0, 0.1]
    async with worker(wait_s=lambda: waits.pop(0), max_queue_time_s=0.0) as served:
        assert (await served.ask()).status_code == 200
        assert (await served.ask()).status_code == 429


async def test_a_request_does_not_wait_for_itself() -> None:
    """The wait is for earlier requests only."""
    seen: list[float] = []

    def wait_s() -> float:
        seen.append(served.workload.pending)
        return 0.0

    async with worker(wait_s=wait_s) as served:
        await served.ask()
        await served.ask()
        assert seen == [0, 0]


async def test_the_queue_time_is_computed_from_pending_tokens() -> None:
    engine = ScriptedEngine(lambda _: [[output("a")], [output("b")], HOLD])
    async with worker(engine) as served:
        connection = connect(served, "/generate", PAYLOAD)
        await until(engine.holding.is_set)
        assert served.workload.wait_s(2.0) == 3.0
        assert served.workload.wait_s(0.0) > 1000
        await connection.go_away()
        assert served.workload.wait_s(2.0) == 0


async def test_requests_in_a_session_add_queue_time_but_the_session_does_not() -> None:
    """The cost of a session is a number chosen by its client."""
    engine = ScriptedEngine(lambda _: [HOLD])
    async with worker(engine) as served:
        opened = await served.ask({}, "/session/create", cost=10**9)
        assert served.workload.wait_s(2.0) == 0
        body = served.envelope(session_id=opened.json()["session_id"])
        app: Any = served.app
        connection = Connection(app, "/generate", body)
        await until(engine.holding.is_set)
        assert served.workload.wait_s(2.0) == 4.0
        await connection.go_away()


async def test_a_request_that_would_wait_too_long_is_rejected_load() -> None:
    async with worker(wait_s=lambda: 61.0) as served:
        await served.ask()
        assert figures(served.workload) == (0, 0, 0, 8)
        (ended,) = served.workload.ended
        assert (ended.started_at, ended.completed_at) == (0.0, 0.0)
        assert not ended.success


@EACH_ROUTE
async def test_a_request_without_a_free_permit_is_rejected_load(path: str, payload: Any) -> None:
    async with worker(ScriptedEngine(permits=0)) as served:
        response = await served.ask(payload, path)
        if "stream" not in path and not payload.get("stream"):
            assert response.status_code == 429
        assert figures(served.workload) == (0, 0, 0, 8)
        assert served.outcomes() == [(42, "Rejected")]


async def test_each_attempt_of_a_retried_request_is_reported() -> None:
    engine = ScriptedEngine(permits=0)
    async with worker(engine) as served:
        await served.ask()
        engine.max_permits = engine.num_permits = 1
        await served.ask()
        assert served.outcomes() == [(42, "Rejected"), (42, "Success")]


# -- faults -------------------------------------------------------------------------------


async def test_a_failed_generation_is_424_and_an_error() -> None:
    async with worker(ScriptedEngine(lambda _: [[output("a")], [Failed("CUDA")]])) as served:
        response = await served.ask()
        assert response.status_code == 424
        assert figures(served.workload) == (1, 1, 0, 0)
        (ended,) = served.workload.ended
        assert str(ended.outcome) == "Error"
        assert not ended.success


@STREAMS
async def test_a_generation_that_fails_in_its_stream_is_an_error(path: str, payload: Any) -> None:
    async with worker(ScriptedEngine(lambda _: [[output("a")], [Failed("CUDA")]])) as served:
        response = await served.ask(payload, path)
        assert response.status_code == 200
        assert "error" in response.text
        assert served.outcomes() == [(42, "Error")]


@EACH_ROUTE
async def test_a_generation_without_an_end_is_an_error(path: str, payload: Any) -> None:
    async with worker(ScriptedEngine(lambda _: [[output("a")]])) as served:
        await served.ask(payload, path)
        assert served.outcomes() == [(42, "Error")]


@EACH_ROUTE
async def test_a_dead_engine_is_an_error(path: str, payload: Any) -> None:
    engine = ScriptedEngine()
    engine.state, engine.reason = "dead", "CUDA"
    async with worker(engine) as served:
        await served.ask(payload, path)
        assert served.outcomes() == [(42, "Error")]
        assert figures(served.workload) == (0, 0, 0, 0)


async def test_an_unexpected_exception_is_500_and_an_error() -> None:
    engine = ScriptedEngine()
    engine.submit_all = lambda _: 1 / 0  # type: ignore[assignment, return-value]
    async with worker(engine) as served:
        app: Any = served.app
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://worker") as http:
            response = await http.post("/generate", json=served.envelope())
        assert response.status_code == 500
        assert served.outcomes() == [(42, "Error")]
        assert served.workload.pending == 0


@EACH_ROUTE
async def test_an_invalid_request_is_no_error_of_the_worker(path: str, payload: Any) -> None:
    async with worker() as served:
        await served.ask(payload | {"inputs": "", "messages": 7}, path)
        assert served.outcomes() == [(42, "Success")]
        assert figures(served.workload) == (0, 0, 0, 0)


# -- clients that go away -----------------------------------------------------------------


@EACH_ROUTE
async def test_a_client_that_goes_away_is_cancelled(path: str, payload: Any) -> None:
    engine = ScriptedEngine(lambda _: [[output("a")], HOLD])
    async with worker(engine) as served:
        connection = connect(served, path, payload)
        await until(engine.holding.is_set)
        await connection.go_away()
        assert engine.num_aborts == 1
        assert figures(served.workload) == (1, 1, 0, 0)
        (ended,) = served.workload.ended
        assert str(ended.outcome) == "Cancelled"
        assert ended.success
        assert ended.started_at > 0
        assert ended.completed_at == 0.0


@EACH_ROUTE
async def test_a_client_that_goes_away_while_it_is_validated_is_cancelled(
    path: str, payload: Any
) -> None:
    engine = ScriptedEngine()
    engine.tokenizer.gate.clear()
    async with worker(engine) as served:
        connection = connect(served, path, payload)
        await until(lambda: engine.num_permits < engine.max_permits)
        await connection.go_away()
        engine.tokenizer.gate.set()
        assert served.outcomes() == [(42, "Cancelled")]
        assert figures(served.workload) == (0, 0, 0, 0)


async def test_a_client_that_goes_away_while_it_sends_its_body_is_not_counted() -> None:
    async with worker() as served:
        connection = connect(served, "/generate", PAYLOAD, partial=True)
        await asyncio.sleep(0.01)
        await connection.go_away()
        assert not served.workload.ended
        assert served.workload.num_received == 0


@EACH_ROUTE
async def test_a_client_that_disconnects_after_its_answer_is_not_cancelled(
    path: str, payload: Any
) -> None:
    """Servers report a disconnect as soon as the last byte is sent."""
    script: list[list[Event]] = [[output("a")], [output("b"), finished("ab", 2)]]
    async with worker(ScriptedEngine(lambda _: script)) as served:
        over = asyncio.Event()
        messages = [
            {
                "type": "http.request",
                "body": httpx2.Request(
                    "POST", "http://worker", json=served.envelope(payload)
                ).content,
                "more_body": False,
            }
        ]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await over.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                over.set()
                await asyncio.sleep(0.01)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [],
        }
        await served.app(scope, receive, send)
        assert served.outcomes() == [(42, "Success")]
