"""The process of the server: read the settings, load the model, and serve until a signal."""

import asyncio
import gc
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence

import psutil
import uvicorn

from api.app import create_app
from api.generation.state import AppState, build_state
from api.handover import Handover
from api.http.connections import raise_file_limit
from api.server import CannotListen, Server, check_port, server_config
from api.settings.config import (
    ConfigError,
    Settings,
    platform_identity,
    read_settings,
)
from api.settings.launcher_flags import flag_of
from api.settings.runtime_info import runtime_info
from api.telemetry.logs import configure_logging, connected
from api.vast import pyworker
from api.vast.worker import AlreadyRunning, report_failure
from api.vast.worker import run as run_worker
from engine.async_engine import AsyncEngine
from engine.core.errors import DownloadFailed, LoadError
from engine.core.metrics import ColdStart

logger = logging.getLogger("api")


class _PlainServer(Server):
    """Prints and logs when it is ready. With `repeats` it logs that again, as a pyworker that reads
    the log might start late.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: AsyncEngine,
        repeats: bool,
        handover: Handover | None,
    ) -> None:
        super().__init__(config)
        self.attach(engine)
        self._repeats = repeats
        self._handover = handover

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        if self._handover is not None:
            self._handover.mark_ready()
        print(_ready_line(host, port), flush=True)
        if self.engine is not None:
            logger.info("ready: %s", self.engine.cold_start)
        connected()
        if self._repeats and self.engine is not None:
            self._repeating = asyncio.create_task(pyworker.repeat_connected(self.engine))


_EXITS: tuple[tuple[type[Exception], str], ...] = (
    (DownloadFailed, "DownloadError"),
    (LoadError, "ShardCannotStart"),
    (Exception, "WebserverFailed"),
)
"""TGI's names of the errors that end its launcher. Vast's workers look for them in the log."""


def main(argv: Sequence[str], handover: Handover | None = None) -> int:
    """Serve until a signal and return the exit status. `handover` is None without a supervisor,
    which would start the server again after it lost its engine.
    """
    return _until_a_signal(lambda: _serve(argv, handover))


def report_until_stopped(reason: str) -> int:
    """Report to Vast that this worker has failed for good; on other machines return at once."""
    return _until_a_signal(lambda: _fail(reason))


def _until_a_signal(work: Callable[[], int]) -> int:
    # The first process of a container ignores SIGTERM unless it has a handler, and uvicorn's comes
    # later. uvicorn raises the signal again after it has drained: that is an orderly exit.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Shells let the processes that they start in the background ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return work()
    except KeyboardInterrupt:
        return 0


def _serve(argv: Sequence[str], handover: Handover | None) -> int:
    try:
        return _run(argv, handover)
    except ConfigError as error:
        print(f"Error: ArgumentValidation({json.dumps(str(error))})", file=sys.stderr)
        return _fail(str(error))
    except AlreadyRunning as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (LoadError, CannotListen) as error:
        logger.debug("where it failed:", exc_info=error)
        return _end(error, str(error))
    except Exception as error:
        logger.exception("a fault that nothing expects:")
        return _end(error, f"the server cannot run: {_unexpected(error)}")


def _end(error: Exception, message: str) -> int:
    """Say why the server ends, in our words and in TGI's, and return the exit status."""
    name = next(name for kind, name in _EXITS if isinstance(error, kind))
    print(f"error: {message}\nError: {name}", file=sys.stderr)
    logger.error("Error: %s", name)
    return _fail(f"Worker Server failed to launch: {message}")


def _unexpected(error: Exception) -> str:
    """Return the error in one line, for users; the log has the traceback, for developers."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} (the log says where; please report it)"


def _fail(reason: str) -> int:
    """Return the exit status of a failure. A worker of Vast first reports `reason` until it is told
    to stop, as Vast takes a silent worker to be loading.
    """
    identity = platform_identity()
    if identity is not None:
        report_failure(identity, reason)
    return 1


def _run(argv: Sequence[str], handover: Handover | None) -> int:
    settings = read_settings(argv)
    behind = settings.vast_mode == "behind pyworker"
    configure_logging(
        settings.json_output or behind,
        settings.log_level,
        settings.log_colorize,
        pyworker.log_file(settings.model_log) if behind else None,
    )
    _print_environment_and_notes(settings)
    raise_file_limit()
    if settings.vast_mode == "worker":
        return run_worker(settings.vast_worker(), lambda: _load(settings), handover)
    hostname, port = settings.address
    check_port(hostname, port, flag_of("port"))
    state = _load(settings)
    drain_s = settings.graceful_termination_timeout
    config = server_config(create_app(state), hostname, port, drain_s)
    server = _PlainServer(config, state.engine, behind, handover)
    if handover is not None:
        handover.termination_s = server.termination_s
    server.run()
    return server.exit_status


def _print_environment_and_notes(settings: Settings) -> None:
    if settings.env:
        print(runtime_info(), flush=True)
    for note in settings.notes():
        logger.warning(note)


def _load(settings: Settings) -> AppState:
    settings.export_library_settings()
    from engine.loading.hub import check_model_id  # reads the environment when it is imported

    cold_start = ColdStart()
    cold_start.add("start", time.time() - psutil.Process().create_time())
    with cold_start.phase("import"):
        check_model_id(settings.model_id, settings.revision)  # before torch, which takes seconds
        from engine.engine import Engine  # imports torch, so only once the settings are valid

    try:
        engine = Engine.load(settings.load_config(), settings.engine_config(), cold_start)
    except LoadError:
        raise
    except Exception as error:
        logger.exception("a fault that nothing expects:")
        raise LoadError(f"{settings.model_id} cannot be served: {_unexpected(error)}") from error
    for note in settings.notes_on_device(engine.info.device == "cpu"):
        logger.warning(note)
    for line in engine.summary():
        print(line, flush=True)
    # The objects that loading leaves stay for good. Without this, each full garbage collection
    # would look through them and stop all threads for half a second.
    gc.collect()
    gc.freeze()
    return build_state(
        AsyncEngine(
            engine,
            max_concurrent_requests=settings.max_concurrent_requests,
            stall_timeout_s=settings.stall_timeout,
            watchdog_timeout_s=settings.watchdog_timeout,
        ),
        settings,
    )


def _ready_line(host: str, port: int) -> str:
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    address = f"[{address}]" if ":" in address else address
    body = '{"inputs":"The capital of France is","parameters":{"max_new_tokens":20}}'
    return (
        f"Ready on {host}:{port}. Try: curl {address}:{port}/generate "
        f"-H 'Content-Type: application/json' -d '{body}'"
    )
