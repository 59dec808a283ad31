"""How `Worker` connects its parts."""

from pathlib import Path

import httpx2
import pytest
from pydantic import SecretStr

from api.generation.state import AppState
from api.settings.vast_variables import Identity, WorkerConfig
from api.vast.worker import Worker
from tests.api.client import make_app, until
from tests.api.scripted import ScriptedEngine
from tests.api.vast.worker import AUTH, PAYLOAD, TOKEN, URL, make_state

pytestmark = pytest.mark.anyio


def ready_worker(engine: ScriptedEngine, state: AppState, api_key: str | None) -> Worker:
    """Return an unsecured worker that is past its benchmark."""
    config = WorkerConfig(
        identity=Identity(1, SecretStr(TOKEN), ("https://run.example",), URL),
        port=3000,
        use_ssl=False,
        unsecured=True,
        max_queue_time_s=60.0,
        max_sessions=1,
        console_url="https://console.example",
        tls_directory=Path("/nowhere"),
        benchmark_cache=Path("/nowhere"),
        benchmark_seconds=1.0,
    )
    worker = Worker(config, lambda: state, httpx2.AsyncClient())
    worker._app.application = make_app(engine, api_key=api_key)
    worker._start_serving(state)
    return worker


@pytest.mark.parametrize("api_key", [None, "owner"])
async def test_the_closing_call_of_a_session_reaches_the_model(api_key: str | None) -> None:
    engine = ScriptedEngine()
    state = make_state(engine, api_key=api_key)
    worker = ready_worker(engine, state, api_key)
    transport = httpx2.ASGITransport(worker._app)
    auth = AUTH | {"signature": ""}
    closing = {"on_close_route": "/generate", "on_close_payload": PAYLOAD}
    async with httpx2.AsyncClient(transport=transport, base_url="http://worker") as http:
        body = {"auth_data": auth, "payload": closing}
        created = (await http.post("/session/create", json=body)).json()
        end = {"session_id": created["session_id"], "session_auth": auth}
        assert (await http.post("/session/end", json=end)).status_code == 200
        await until(lambda: len(engine.requests) == 1)
        await until(lambda: not worker._sessions._closing)
    await worker._http.aclose()


async def test_a_worker_that_starts_serving_reports_at_once_that_it_is_ready() -> None:
    engine = ScriptedEngine()
    worker = ready_worker(engine, make_state(engine), None)
    assert worker._readiness.load_s > 0
    assert worker._reporter._soon.is_set()
    await worker._http.aclose()


async def test_a_full_worker_answers_429_before_a_stream_begins() -> None:
    """A plain server reports it inside the stream, which clients do not retry elsewhere."""
    engine = ScriptedEngine(permits=0)
    worker = ready_worker(engine, make_state(engine), None)
    transport = httpx2.ASGITransport(worker._app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://worker") as http:
        body = {"auth_data": AUTH | {"signature": ""}, "payload": PAYLOAD}
        answer = await http.post("/generate_stream", json=body)
    assert (answer.status_code, answer.content) == (429, b"")
    await worker._http.aclose()
