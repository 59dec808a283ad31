"""A worker's life: it listens and reports from its first second, loads, measures itself, serves,
and reports what is wrong for as long as anything is.
"""

import asyncio
import logging
import math
import os
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
from api.server import CannotListen, Server, check_port, server_config
from api.settings.config import ConfigError
from api.settings.vast_variables import Identity, WorkerConfig
from api.vast import benchmark
from api.vast.books import Books
from api.vast.certificate import CertificateFiles, NotSigned, have_signed
from api.vast.errors import Errors
from api.vast.front import Front
from api.vast.gate import Gate, Rules
from api.vast.public_key import PublicKeys
from api.vast.reporter import Readiness, Reporter
from api.vast.sessions import Sessions
from engine.core.errors import LoadError

_HEALTH_S = 1.0
_PREPARED_S = 0.05
_CERTIFICATE_RETRY_S = 60.0
_DRAIN_S = 6
"""The platform's supervisor kills after 10 s, and the last reports take some."""

logger = logging.getLogger(__name__)

Load = Callable[[], AppState]


class AlreadyRunning(Exception):
    """This machine has a worker on that port, and it needs no second one."""


def run(config: WorkerConfig, load: Load) -> None:
    """Serve until told to stop. Raises AlreadyRunning, CannotListen. `load` raises LoadError,
    ConfigError.
    """
    with _only_worker(config.port):
        check_port("0.0.0.0", config.port, "WORKER_PORT")
        if uvloop.run(_run(config, load)).is_loading:
            os._exit(0)  # what loads cannot be told to stop


async def _run(config: WorkerConfig, load: Load) -> "Worker":
    async with httpx2.AsyncClient() as http:
        worker = Worker(config, load, http)
        await worker.run()
        return worker


@contextmanager
def _only_worker(port: int) -> Iterator[None]:
    """An address of the kernel's, which ends with its process: no file to be left behind."""
    with socket.socket(socket.AF_UNIX) as mark:
        try:
            mark.bind(f"\0skiff-worker-{port}")
        except OSError:
            raise AlreadyRunning(f"a worker is running on port {port} already") from None
        yield


def report_failure(identity: Identity, message: str) -> None:
    """Until told to stop: a worker that is silent is taken to be loading, and billed."""
    errors = Errors()

    async def tell() -> None:
        async with httpx2.AsyncClient() as http:
            reporter = Reporter(http, identity, Books(), errors, Readiness())
            errors.raised("start", message)
            await reporter.run()

    asyncio.run(tell())


class Worker:
    """One run of one worker. Everything in it is on the event loop, but for loading."""

    def __init__(self, config: WorkerConfig, load: Load, http: httpx2.AsyncClient) -> None:
        self._config = config
        self._load = load
        self._http = http
        self._errors = Errors()
        self._books = Books()
        self._readiness = Readiness()
        identity = config.identity
        self._keys = PublicKeys(self._http, identity.report_addresses, self._errors)
        self._sessions = Sessions(self._books, config.max_sessions)
        self._front = Front(self._sessions, identity.master_token)
        self._reporter = Reporter(self._http, identity, self._books, self._errors, self._readiness)
        self._files = CertificateFiles(config.tls_directory)
        self._tasks: list[asyncio.Task[None]] = []
        self.is_loading = False

    async def run(self) -> None:
        """Until a signal; then what runs has a few seconds to end, and the books are told."""
        if self._config.unsecured:
            logger.warning("UNSECURED: whoever reaches this worker is served, signed or not")
        self._begin(self._reporter.run())
        async with AsyncExitStack() as ending:
            ending.push_async_callback(self._end)
            server = self._server()
            self._begin(self._become_ready(server, ending))
            self._begin(self._sessions.sweep())
            await server.serve()
            self._sessions.close_all()

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._reporter.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    def _server(self) -> "_Server":
        options: dict[str, Any] = {"lifespan": "off"}
        if self._config.use_ssl:
            self._have_certificate()
            options |= {
                "ssl_certfile": self._files.certificate,
                "ssl_keyfile": self._files.key,
            }
        return _Server(
            server_config(self._front, "0.0.0.0", self._config.port, _DRAIN_S, **options)
        )

    def _have_certificate(self) -> None:
        """One that the platform has signed, or one to listen with until it has."""
        try:
            if not self._files.usable():
                self._files.make_request()
                self._files.sign_ourselves()
        except OSError as error:
            raise CannotListen(f"TLS_DIRECTORY: {error}") from None

    # -- until it is ready ------------------------------------------------------------

    async def _become_ready(self, server: "_Server", ending: AsyncExitStack) -> None:
        """What takes time runs side by side: the model, the key, the certificate."""
        trusted = self._begin(self._become_trusted(server))
        try:
            state = await self._loaded()
            server.engine = state.engine
            app = create_app(state)
            await ending.enter_async_context(app.router.lifespan_context(app))
            self._front.application = app
            self._begin(self._watch(state))
            await self._measure(state)
        except Exception as error:
            logger.exception("the worker does not start")
            self._front.reason = str(error)
            self._errors.raised("load", _told(error))
            return
        await trusted
        self._open(state)

    async def _loaded(self) -> AppState:
        self.is_loading = True
        try:
            return await _in_daemon_thread(self._load)
        finally:
            self.is_loading = False

    async def _become_trusted(self, server: "_Server") -> None:
        works = []
        if not self._config.unsecured:
            works.append(self._keys.obtain())
        if self._config.use_ssl and not self._files.usable():
            works.append(self._obtain_certificate(server))
        await asyncio.gather(*works)

    async def _obtain_certificate(self, server: "_Server") -> None:
        while True:
            try:
                identity = self._config.identity
                await have_signed(
                    self._files, self._http, self._config.console_url, identity.container_id
                )
                server.use_certificate(self._files)
            except (NotSigned, OSError) as error:
                self._errors.raised("certificate", f"no signed certificate: {error}")
                await asyncio.sleep(_CERTIFICATE_RETRY_S)
            else:
                self._errors.cleared("certificate")
                return

    async def _measure(self, state: AppState) -> None:
        while not state.engine.is_prepared:
            await asyncio.sleep(_PREPARED_S)
        self._front.reason = "the benchmark is running"
        with state.engine.cold_start.phase("benchmark"):
            await self._benchmark(state)

    async def _benchmark(self, state: AppState) -> None:
        key = benchmark.key_of(state)
        self._readiness.max_perf = await benchmark.max_perf(
            state.engine, key, self._config.benchmark_cache, self._config.benchmark_seconds
        )

    def _open(self, state: AppState) -> None:
        """Requests may come, and the autoscaler hears so at once."""
        key = state.settings.api_key
        rules = Rules(
            unsecured=self._config.unsecured,
            api_key=None if key is None else key.get_secret_value(),
            payload_limit=state.settings.payload_limit,
            max_queue_time_s=self._config.max_queue_time_s,
            wait_s=lambda: self._wait_s(state),
        )
        assert self._front.application is not None
        self._front.gate = Gate(
            self._front.application, rules, self._keys, self._books, self._sessions
        )
        self._sessions.on_close = partial(self._call, rules.api_key)
        self._readiness.load_s = time.time() - psutil.Process().create_time()
        self._reporter.report_soon()
        cold_start, perf = state.engine.cold_start, self._readiness.max_perf
        logger.info("ready after %.1f s (%s)", self._readiness.load_s, cold_start)
        logger.info("worker of %.0f tokens/s at %s", perf, self._config.identity.url)

    # -- while it serves --------------------------------------------------------------

    def _wait_s(self, state: AppState) -> float:
        """What is owed to those before, if anyone waits at all: else a request starts at once."""
        if not state.engine.free_permits:
            return math.inf
        if not state.engine.status().figures.num_waiting:
            return 0.0
        return self._books.wait_s(self._readiness.max_perf)

    async def _watch(self, state: AppState) -> None:
        """Health is read, never asked of the device."""
        while True:
            status = state.engine.status()
            if status.healthy:
                self._errors.cleared("engine")
            else:
                self._errors.raised("engine", f"{status.state}: {status.reason}")
            await asyncio.sleep(_HEALTH_S)

    async def _call(self, api_key: str | None, route: str, payload: Mapping[str, Any]) -> None:
        assert self._front.application is not None
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        transport = httpx2.ASGITransport(self._front.application)
        async with httpx2.AsyncClient(transport=transport, base_url="http://worker") as http:
            await http.post(route, json=payload, headers=headers)


class _Server(Server):
    """Signals are the worker's, and a certificate can be replaced while it listens."""

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
        """For connections from now on."""
        if self.config.loaded and self.config.ssl is not None:
            self.config.ssl.load_cert_chain(files.certificate, files.key)


async def _in_daemon_thread(work: Load) -> AppState:
    """It does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[AppState] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            tell(done.set_exception, error)
        else:
            tell(done.set_result, result)

    def tell(how: Callable[[Any], None], what: object) -> None:
        loop.call_soon_threadsafe(_unless_cancelled, done, how, what)

    threading.Thread(target=run, name="skiff-loading", daemon=True).start()
    return await done


def _unless_cancelled(
    future: asyncio.Future[AppState], how: Callable[[Any], None], what: object
) -> None:
    if not future.cancelled():
        how(what)


def _told(error: Exception) -> str:
    """To the autoscaler: what was written to be read, and of all else its kind."""
    if isinstance(error, benchmark.BenchmarkFailed):
        return f"Benchmark failed with error: {error}"
    if isinstance(error, LoadError | ConfigError):
        return str(error)
    return type(error).__name__
