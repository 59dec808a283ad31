"""The parts as a worker puts them together."""

from pathlib import Path

import httpx2
import pytest
from pydantic import SecretStr

from api.generation.state import AppState, build_state
from api.settings.config import Settings
from api.settings.vast_variables import Identity, WorkerConfig
from api.vast.worker import Worker
from tests.api.client import make_app, until
from tests.api.scripted import ScriptedEngine
from tests.api.vast.worker import AUTH, PAYLOAD, TOKEN, URL

pytestmark = pytest.mark.anyio


def opened(engine: ScriptedEngine, state: AppState, api_key: str | None) -> Worker:
    """Unsecured, and past its benchmark."""
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
    state = build_state(engine, Settings(api_key=api_key))  # type: ignore[arg-type]
    worker = opened(engine, state, api_key)
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


async def test_an_open_worker_is_ready_and_says_so_at_once() -> None:
    engine = ScriptedEngine()
    worker = opened(engine, build_state(engine, Settings()), None)  # type: ignore[arg-type]
    assert worker._readiness.load_s > 0
    assert worker._reporter._soon.is_set()
    await worker._http.aclose()


async def test_a_full_worker_says_so_before_a_stream_begins() -> None:
    """Told in the stream, as a plain server tells it, nobody would try it elsewhere."""
    engine = ScriptedEngine(permits=0)
    worker = opened(engine, build_state(engine, Settings()), None)  # type: ignore[arg-type]
    transport = httpx2.ASGITransport(worker._app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://worker") as http:
        body = {"auth_data": AUTH | {"signature": ""}, "payload": PAYLOAD}
        answer = await http.post("/generate_stream", json=body)
    assert (answer.status_code, answer.content) == (429, b"")
    await worker._http.aclose()
