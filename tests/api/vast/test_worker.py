"""A whole worker as the autoscaler and its clients see it, from its first second to its last.

The engine is scripted; the port, TLS and the clock are real.
"""

import asyncio
import base64
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import SecretStr

from api.generation.state import AppState
from api.handover import Handover
from api.server import CannotListen
from api.settings.vast_variables import Identity, WorkerConfig
from api.vast import public_key, reporter
from api.vast.worker import AlreadyRunning, Worker, _only_worker
from engine.core.errors import LoadError
from tests.api.scripted import ScriptedEngine
from tests.api.vast.test_benchmark import as_many_as_asked
from tests.api.vast.test_certificate import signed
from tests.api.vast.worker import make_state

pytestmark = pytest.mark.anyio
KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


class Platform:
    """The autoscaler and the console, as far as a worker calls them."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.ended: list[dict[str, Any]] = []
        self.has_key = True
        self.signs = True

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        match request.url.path:
            case "/pubkey/" if self.has_key:
                public = KEY.public_key()
                pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
                return httpx2.Response(200, content=pem)
            case "/api/v0/sign_cert/" if self.signs:
                return httpx2.Response(200, content=signed(request.content))
            case "/worker_status/":
                self.reports.append(json.loads(request.content))
                return httpx2.Response(200)
            case "/delete_requests/":
                self.ended += json.loads(request.content)["requests"]
                return httpx2.Response(200)
        return httpx2.Response(500)

    async def report(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for the first report that meets `condition`."""
        async with asyncio.timeout(5):
            while True:
                for report in self.reports:
                    if condition(report):
                        return report
                await asyncio.sleep(0.01)


def is_loaded(report: dict[str, Any]) -> bool:
    return report["loadtime"] > 0


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "_TICK_S", 0.02)
    monkeypatch.setattr(reporter, "_MAX_SILENCE_S", 0.2)
    monkeypatch.setattr(public_key, "_BACKOFF_S", (0.02,))
    monkeypatch.setattr(public_key, "_RETRY_S", 0.05)


@pytest.fixture
def config(tmp_path: Path) -> WorkerConfig:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    identity = Identity(42, SecretStr("token"), ("http://a",), f"http://127.0.0.1:{port}")
    return WorkerConfig(
        identity=identity,
        port=port,
        use_ssl=False,
        unsecured=False,
        max_queue_time_s=60.0,
        max_sessions=10,
        console_url="http://console",
        tls_directory=tmp_path,
        benchmark_cache=tmp_path,
        benchmark_seconds=60,
    )


def loader_of(engine: ScriptedEngine) -> Callable[[], AppState]:
    return lambda: make_state(engine)


@asynccontextmanager
async def running(
    config: WorkerConfig,
    platform: Platform,
    load: Callable[[], AppState],
    handover: Handover | None = None,
) -> AsyncIterator[httpx2.AsyncClient]:
    """Run a worker and yield a client of it; at the end stop the worker as a signal would."""
    servers: list[Any] = []

    class Stoppable(Worker):
        def _server(self) -> Any:
            servers.append(super()._server())
            return servers[0]

    async with httpx2.AsyncClient(transport=httpx2.MockTransport(platform)) as http:
        running_worker = asyncio.create_task(Stoppable(config, load, http, handover).run())
        await platform.report(lambda _: True)
        async with httpx2.AsyncClient(base_url=config.identity.url) as client:
            yield client
        servers[0].should_exit = True
        await asyncio.wait_for(running_worker, 10)


def envelope(config: WorkerConfig, num_tokens: int = 3, request_idx: int = 7) -> dict[str, Any]:
    url = config.identity.url
    message = json.dumps({"url": url}, indent=4).encode()
    signature = base64.b64encode(KEY.sign(message, padding.PKCS1v15(), hashes.SHA256()))
    auth = {
        "signature": signature.decode(),
        "cost": num_tokens,
        "endpoint": "e",
        "reqnum": 1,
        "request_idx": request_idx,
        "url": url,
    }
    payload = {"inputs": "x", "parameters": {"max_new_tokens": num_tokens}}
    return {"auth_data": auth, "payload": payload, "session_id": None}


async def test_a_worker_reports_while_it_loads_and_at_once_when_it_is_ready(
    config: WorkerConfig,
) -> None:
    platform = Platform()
    async with running(config, platform, loader_of(ScriptedEngine(as_many_as_asked))):
        loaded = await platform.report(is_loaded)
    assert platform.reports[0]["loadtime"] == 0.0
    assert loaded["max_perf"] > 0
    assert loaded["error_msg"] == ""
    assert loaded["url"] == config.identity.url


async def test_a_signed_request_is_served_and_its_end_reported(config: WorkerConfig) -> None:
    platform = Platform()
    async with running(config, platform, loader_of(ScriptedEngine(as_many_as_asked))) as client:
        await platform.report(is_loaded)
        answer = await client.post("/generate/", json=envelope(config))
        assert answer.json() == {"generated_text": "aaa"}
        await platform.report(lambda _: sum(r["cur_perf"] for r in platform.reports) == 3)
        assert sum(r["new_load"] for r in platform.reports) == 3
        assert platform.reports[-1]["cur_load"] == 0
    (ended,) = platform.ended
    assert (ended["request_idx"], ended["status"], ended["success"]) == (7, "Success", True)


async def test_a_worker_that_loads_answers_503_with_the_reason(config: WorkerConfig) -> None:
    go_on = asyncio.Event()
    loop = asyncio.get_running_loop()

    def load() -> AppState:
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(10)
        return loader_of(ScriptedEngine(as_many_as_asked))()

    platform = Platform()
    async with running(config, platform, load) as client:
        answer = await client.get("/health")
        assert answer.status_code == 503
        assert answer.json()["reason"] == "the model is being loaded"
        assert (await client.post("/generate", json=envelope(config))).status_code == 503
        assert (await client.get("/ping")).text == "pong"
        go_on.set()
        await platform.report(is_loaded)
        assert (await client.get("/health")).status_code == 200


async def test_a_failed_load_is_reported_again_and_again(config: WorkerConfig) -> None:
    def load() -> AppState:
        raise LoadError("org/model is gated: accept its terms on the hub and set HF_TOKEN")

    platform = Platform()
    async with running(config, platform, load) as client:

        def is_reported_three_times(_: object) -> bool:
            return sum("is gated" in report["error_msg"] for report in platform.reports) >= 3

        await platform.report(is_reported_three_times)
        assert (await client.get("/health")).json()["reason"].startswith("org/model is gated")
    assert not any(is_loaded(report) for report in platform.reports)


@pytest.mark.parametrize("is_known", [True, False])
async def test_only_a_fault_that_nothing_expects_has_its_traceback_in_the_log(
    is_known: bool, config: WorkerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    def load() -> AppState:
        raise (LoadError if is_known else KeyError)("no such layer")

    platform = Platform()
    async with running(config, platform, load):
        await platform.report(lambda report: report["error_msg"] != "")
    (record,) = [r for r in caplog.records if "cannot start" in r.message]
    assert "no such layer" in record.message
    assert bool(record.exc_info) is not is_known


@pytest.mark.slow
async def test_an_engine_error_is_cleared_when_it_is_over(config: WorkerConfig) -> None:
    platform, engine = Platform(), ScriptedEngine(as_many_as_asked)
    async with running(config, platform, loader_of(engine)):
        await platform.report(is_loaded)
        engine.state, engine.reason = "stalled", "no step for 60 s"
        await platform.report(lambda report: report["error_msg"] == "stalled: no step for 60 s")
        engine.state = "ready"
        platform.reports.clear()
        await platform.report(lambda report: report["error_msg"] == "")


@pytest.mark.slow
async def test_a_supervised_worker_whose_engine_stalls_is_loading_until_it_goes_on(
    config: WorkerConfig,
) -> None:
    platform, engine = Platform(), ScriptedEngine(as_many_as_asked)
    async with running(config, platform, loader_of(engine), Handover()):
        ready = await platform.report(is_loaded)
        for state in ("stalled", "dead"):
            engine.state, engine.reason = state, "no step for 60 s"
            platform.reports.clear()
            paused = await platform.report(lambda report: not is_loaded(report))
            assert paused["max_perf"] == 0
            engine.state = "ready"
            platform.reports.clear()
            again = await platform.report(is_loaded)
            assert [again[key] for key in ("loadtime", "max_perf")] == [
                ready[key] for key in ("loadtime", "max_perf")
            ]
    assert all(report["error_msg"] == "" for report in platform.reports)


async def test_a_worker_is_not_ready_without_the_public_key(config: WorkerConfig) -> None:
    platform = Platform()
    platform.has_key = False
    async with running(config, platform, loader_of(ScriptedEngine(as_many_as_asked))):
        await platform.report(lambda report: report["error_msg"] == public_key.MISSING)
        assert not any(is_loaded(report) for report in platform.reports)
        platform.has_key = True
        assert (await platform.report(is_loaded))["error_msg"] == ""


async def test_an_unsecured_worker_needs_no_public_key(
    config: WorkerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    platform = Platform()
    platform.has_key = False
    unsecured = replace(config, unsecured=True)
    async with running(unsecured, platform, loader_of(ScriptedEngine(as_many_as_asked))) as client:
        await platform.report(is_loaded)
        plain = {"inputs": "x", "parameters": {"max_new_tokens": 2}}
        assert (await client.post("/generate", json=plain)).json() == {"generated_text": "aa"}
    assert "UNSECURED" in caplog.text


async def test_a_worker_serves_with_the_certificate_that_vast_signed(
    config: WorkerConfig,
) -> None:
    platform = Platform()
    with_tls = replace(config, use_ssl=True)
    async with running(with_tls, platform, loader_of(ScriptedEngine(as_many_as_asked))):
        await platform.report(is_loaded)
        assert "the platform's root" in await issuer_of(config.port)


async def test_a_worker_without_a_signed_certificate_listens_and_reports_an_error(
    config: WorkerConfig,
) -> None:
    platform = Platform()
    platform.signs = False
    with_tls = replace(config, use_ssl=True)
    async with running(with_tls, platform, loader_of(ScriptedEngine(as_many_as_asked))):
        await platform.report(lambda report: "no signed certificate" in report["error_msg"])
        assert "pyworker.vast.ai" in await issuer_of(config.port)
    assert not any(is_loaded(report) for report in platform.reports)


async def issuer_of(port: int) -> str:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(der).issuer.rfc4514_string()


async def test_a_certificate_folder_that_cannot_be_written_stops_the_worker(
    config: WorkerConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    nowhere = replace(config, use_ssl=True, tls_directory=tmp_path / "file")
    async with httpx2.AsyncClient(transport=httpx2.MockTransport(Platform())) as http:
        with pytest.raises(CannotListen, match=r"TLS_DIRECTORY: .*Not a directory"):
            await Worker(nowhere, loader_of(ScriptedEngine()), http).run()


async def test_a_second_worker_on_the_port_is_refused(config: WorkerConfig) -> None:
    with _only_worker(config.port), pytest.raises(AlreadyRunning), _only_worker(config.port):
        pass
    with _only_worker(config.port):
        pass
