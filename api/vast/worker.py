"""The worker: listens and reports from the first second, loads the model, runs the benchmark,
serves, and reports errors for as long as they last.
"""

import asyncio
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import Any

import httpx2
import psutil
import uvloop

from api.app import create_app
from api.generation.state import AppState
from api.handover import Handover
from api.server import CannotListen, Server, check_port, server_config
from api.settings.config import ConfigError
from api.settings.vast_variables import Identity, WorkerConfig
from api.vast import benchmark
from api.vast.active_errors import ActiveErrors
from api.vast.auth_gateway import AuthGateway, GatewayConfig
from api.vast.books import Books
from api.vast.certificate import CertificateFiles, NotSigned, obtain_certificate
from api.vast.public_key import PublicKeys
from api.vast.reporter import Readiness, Reporter
from api.vast.sessions import Sessions
from api.vast.signature import ReplayGuard
from api.vast.worker_app import WorkerApp
from api.vast.workload import Workload
from engine.core.errors import LoadError
from engine.core.metrics import EngineStatus

_HEALTH_INTERVAL_S = 1.0
_PREPARED_POLL_S = 0.05
_CERTIFICATE_RETRY_S = 60.0
_DRAIN_S = 6
"""Seconds that running requests get to finish. Vast's supervisor kills the process 10 s after
SIGTERM, and the last reports take some of that.
"""

logger = logging.getLogger(__name__)

LoadState = Callable[[], AppState]
_FOR_USERS = (LoadError, ConfigError, benchmark.BenchmarkFailed)
"""Errors whose message is written for users, and needs no traceback."""


class AlreadyRunning(Exception):
    """Another worker runs on that port of this machine."""


def run(config: WorkerConfig, load: LoadState, handover: Handover | None = None) -> int:
    """Serve until a signal or the engine's death, and return the exit status.

    Raises AlreadyRunning, CannotListen. `load` may raise LoadError or ConfigError, which are
    reported. `handover` is None if nothing starts the worker again after its engine's death.
    """
    with _only_worker(config.port):
        check_port("0.0.0.0", config.port, "WORKER_PORT")
        return uvloop.run(_run(config, load, handover))


async def _run(config: WorkerConfig, load: LoadState, handover: Handover | None) -> int:
    async with httpx2.AsyncClient() as http:
        return await Worker(config, load, http, handover).run()


@contextmanager
def _only_worker(port: int) -> Iterator[None]:
    """Hold a lock on the port. The lock is an abstract socket, which the kernel removes with the
    process: no file is left behind.
    """
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind(f"\0skiff-worker-{port}")
        except OSError:
            raise AlreadyRunning(f"a worker is running on port {port} already") from None
        yield


def report_failure(identity: Identity, message: str) -> None:
    """Report an error until stopped. A silent worker would count as loading, and be billed."""
    errors = ActiveErrors()

    async def report() -> None:
        async with httpx2.AsyncClient() as http:
            reporter = Reporter(http, identity, Workload(), errors, Readiness())
            errors.add("start", message)
            await reporter.run()

    asyncio.run(report())


class Worker:
    """One run of a worker. All of it is on the event loop, except loading the model."""

    def __init__(
        self,
        config: WorkerConfig,
        load: LoadState,
        http: httpx2.AsyncClient,
        handover: Handover | None = None,
    ) -> None:
        self._config = config
        self._load = load
        self._http = http
        self._errors = ActiveErrors()
        self._workload = Workload()
        self._replays = ReplayGuard()
        self._handover = handover
        self._books = None if handover is None else Books(handover, self._workload, self._replays)
        self._readiness = Readiness()
        identity = config.identity
        self._keys = PublicKeys(self._http, identity.report_addresses, self._errors)
        self._sessions = Sessions(self._workload, config.max_sessions)
        self._app = WorkerApp(self._sessions, identity.master_token)
        self._reporter = Reporter(
            self._http, identity, self._workload, self._errors, self._readiness
        )
        self._files = CertificateFiles(config.tls_directory)
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        """Run until a signal or the engine's death, and return the exit status. At the end running
        requests get a few seconds to finish, and the last reports are sent.
        """
        if self._config.unsecured:
            logger.warning("UNSECURED: every request is served, signed or not")
        self._start_task(self._reporter.run())
        async with AsyncExitStack() as ending:
            ending.push_async_callback(self._stop)
            server = self._server()
            self._start_task(self._become_ready(server, ending))
            self._start_task(self._sessions.sweep())
            if self._handover is not None and self._books is not None:
                self._handover.termination_s = server.termination_s
                self._reporter.on_delivered = self._books.save
                self._start_task(self._books.keep())
            await server.serve()
            self._sessions.close_all()
            if self._books is not None:
                self._books.save()  # with how the last requests ended
            if server.engine is not None and server.has_lost_engine:
                self._note(server.engine.status())
        return server.exit_status

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._reporter.close()

    def _start_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    def _server(self) -> "_Server":
        options: dict[str, Any] = {"lifespan": "off"}
        if self._config.use_ssl:
            self._ensure_certificate()
            options |= {
                "ssl_certfile": self._files.certificate,
                "ssl_keyfile": self._files.key,
            }
        return _Server(server_config(self._app, "0.0.0.0", self._config.port, _DRAIN_S, **options))

    def _ensure_certificate(self) -> None:
        """Make a self-signed certificate unless there is one that Vast signed."""
        try:
            if not self._files.is_usable():
                self._files.make_request()
                self._files.self_sign()
        except OSError as error:
            raise CannotListen(f"TLS_DIRECTORY: {error}") from None

    # -- start ------------------------------------------------------------

    async def _become_ready(self, server: "_Server", ending: AsyncExitStack) -> None:
        """Load the model, and meanwhile obtain the public key and the certificate."""
        credentials = self._start_task(self._obtain_credentials(server))
        try:
            state = await _in_daemon_thread(self._load)
            server.attach(state.engine)
            app = create_app(state)
            await ending.enter_async_context(app.router.lifespan_context(app))
            self._app.application = app
            self._start_task(self._watch(server))
            await self._measure(state)
        except Exception as error:
            if server.has_lost_engine:
                return
            is_expected = isinstance(error, _FOR_USERS)
            logger.error("the worker cannot start: %s", error, exc_info=not is_expected)
            self._app.reason = str(error)
            self._errors.add("load", _error_text(error))
            return
        await credentials
        self._start_serving(state)

    async def _obtain_credentials(self, server: "_Server") -> None:
        tasks = []
        if not self._config.unsecured:
            tasks.append(self._keys.obtain())
        if self._config.use_ssl and not self._files.is_usable():
            tasks.append(self._obtain_certificate(server))
        await asyncio.gather(*tasks)

    async def _obtain_certificate(self, server: "_Server") -> None:
        while True:
            try:
                identity = self._config.identity
                await obtain_certificate(
                    self._files, self._http, self._config.console_url, identity.container_id
                )
                server.use_certificate(self._files)
            except (NotSigned, OSError) as error:
                self._errors.add("certificate", f"no signed certificate: {error}")
                await asyncio.sleep(_CERTIFICATE_RETRY_S)
            else:
                self._errors.clear("certificate")
                return

    async def _measure(self, state: AppState) -> None:
        while not state.engine.is_prepared:
            await asyncio.sleep(_PREPARED_POLL_S)
        self._app.reason = "the benchmark is running"
        with state.engine.cold_start.phase("benchmark"):
            await self._benchmark(state)

    async def _benchmark(self, state: AppState) -> None:
        key = benchmark.benchmark_key(state)
        self._readiness.max_perf = await benchmark.max_perf(
            state.engine, key, self._config.benchmark_cache, self._config.benchmark_seconds
        )

    def _start_serving(self, state: AppState) -> None:
        """Open the gateway, and report at once that the worker is ready."""
        key = state.settings.api_key
        gateway_config = GatewayConfig(
            unsecured=self._config.unsecured,
            api_key=None if key is None else key.get_secret_value(),
            payload_limit=state.settings.payload_limit,
            max_queue_time_s=self._config.max_queue_time_s,
            wait_s=lambda: self._wait_s(state),
        )
        assert self._app.application is not None
        self._app.gateway = AuthGateway(
            self._app.application,
            gateway_config,
            self._keys,
            self._workload,
            self._sessions,
            self._replays,
        )
        self._sessions.on_close = partial(self._post, gateway_config.api_key)
        if self._handover is not None:
            self._handover.mark_ready()
        self._readiness.load_s = time.time() - psutil.Process().create_time()
        self._reporter.report_soon()
        cold_start, perf = state.engine.cold_start, self._readiness.max_perf
        logger.info("ready after %.1f s (%s)", self._readiness.load_s, cold_start)
        logger.info("worker of %.0f tokens/s at %s", perf, self._config.identity.url)

    # -- serving --------------------------------------------------------------

    def _wait_s(self, state: AppState) -> float:
        """Expected queue time in seconds; 0 if nothing is waiting, infinite if every permit is
        taken.
        """
        if not state.engine.free_permits:
            return math.inf
        if not state.engine.status().figures.num_waiting:
            return 0.0
        return self._workload.wait_s(self._readiness.max_perf)

    async def _watch(self, server: "_Server") -> None:
        """Report how the engine is, until the server ends. Only its published status is read; the
        device is not touched.
        """
        assert server.engine is not None
        while not server.should_exit:
            self._note(server.engine.status())
            await asyncio.sleep(_HEALTH_INTERVAL_S)

    def _note(self, status: EngineStatus) -> None:
        """Have an engine that stands still reported: as an error, which has the autoscaler destroy
        the instance, only if nothing else mends it. A supervisor does.
        """
        if self._books is None and not status.healthy:
            self._errors.add("engine", f"{status.state}: {status.reason}")
            return
        self._errors.clear("engine")
        if self._readiness.is_paused is status.healthy:
            self._readiness.is_paused = not status.healthy
            self._reporter.report_soon()

    async def _post(self, api_key: str | None, route: str, payload: Mapping[str, Any]) -> None:
        assert self._app.application is not None
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        transport = httpx2.ASGITransport(self._app.application)
        async with httpx2.AsyncClient(transport=transport, base_url="http://worker") as http:
            await http.post(route, json=payload, headers=headers)


class _Server(Server):
    """A server that handles signals itself and can change its certificate while it listens."""

    closing_s = 3.2

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        await super().startup(sockets)
        print(f"Worker on port {self.config.port}", flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def use_certificate(self, files: CertificateFiles) -> None:
        """Use a new certificate for connections from now on."""
        if self.config.loaded and self.config.ssl is not None:
            self.config.ssl.load_cert_chain(files.certificate, files.key)


async def _in_daemon_thread(work: LoadState) -> AppState:
    """Await `work` in a thread that does not keep the process from exiting."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[AppState] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            finish(done.set_exception, error)
        else:
            finish(done.set_result, result)

    def finish(setter: Callable[[Any], None], value: object) -> None:
        loop.call_soon_threadsafe(_unless_cancelled, done, setter, value)

    threading.Thread(target=run, name="skiff-loading", daemon=True).start()
    return await done


def _unless_cancelled(
    future: asyncio.Future[AppState], setter: Callable[[Any], None], value: object
) -> None:
    if not future.cancelled():
        setter(value)


def _error_text(error: Exception) -> str:
    """Return the text for the autoscaler: the message of an error that is written for users, and
    only the type of any other, whose message may quote private data.
    """
    if isinstance(error, benchmark.BenchmarkFailed):
        return f"Benchmark failed with error: {error}"
    return str(error) if isinstance(error, _FOR_USERS) else type(error).__name__
