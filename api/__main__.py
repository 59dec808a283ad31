"""`python -m api`: read the settings, load the model, serve until told to stop."""

import asyncio
import json
import logging
import signal
import socket
import sys
from collections.abc import Sequence

import uvicorn

from api.app import create_app
from api.config import ConfigError, Settings, read_settings
from api.launcher_flags import flag_of
from api.logs import configure_logging, connected, stopping
from api.runtime_info import runtime_info
from api.state import AppState, build_state
from engine.async_engine import AsyncEngine
from engine.errors import DownloadFailed, LoadError

logger = logging.getLogger("api")


_LAST_WORDS_S = 0.5
"""Before streams are cut they end, with an error as their last event."""


class Server(uvicorn.Server):
    """uvicorn, with words of our own when requests are served and when they no longer are."""

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine) -> None:
        super().__init__(config)
        self._engine = engine

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        print(_ready_line(host, port), flush=True)
        connected()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping()
        timeout_s = self.config.timeout_graceful_shutdown or 0
        last_words = asyncio.get_running_loop().call_later(
            max(timeout_s - _LAST_WORDS_S, 0), self._engine.give_up, "the server is shutting down"
        )
        await super().shutdown(sockets)
        last_words.cancel()


class PortTaken(Exception):
    """Nothing can be served where it should be."""


_EXITS: tuple[tuple[type[Exception], str], ...] = (
    (DownloadFailed, "DownloadError"),
    (LoadError, "ShardCannotStart"),
    (PortTaken, "WebserverFailed"),
)
"""TGI's names for what ends the launcher: Vast's workers, for one, wait for them in the log."""


def main(argv: Sequence[str]) -> int:
    # Until uvicorn listens to it: the first process of a container ignores it otherwise. And
    # uvicorn raises it again when it has drained: that is leaving in good order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Shells have what they start in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        settings = read_settings(argv)
        configure_logging(settings.json_output, settings.log_level, settings.log_colorize)
        _introduce(settings)
        _check_port_is_free(settings)
        state = _load(settings)
        Server(_server_config(state), state.engine).run()
    except ConfigError as error:
        print(f"Error: ArgumentValidation({json.dumps(str(error))})", file=sys.stderr)
        return 1
    except (LoadError, PortTaken) as error:
        name = next(name for kind, name in _EXITS if isinstance(error, kind))
        print(f"error: {error}\nError: {name}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _introduce(settings: Settings) -> None:
    if settings.env:
        print(runtime_info(), flush=True)
    for note in settings.notes():
        logger.warning(note)


def _check_port_is_free(settings: Settings) -> None:
    """Before the minutes that a model may take to load, not after."""
    family = socket.AF_INET6 if ":" in settings.hostname else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.hostname, settings.port))
        except OSError as error:
            raise PortTaken(f"{flag_of('port')}: {settings.port}: {error.strerror}") from None


def _load(settings: Settings) -> AppState:
    settings.export_hub_settings()
    from engine.engine import Engine  # brings torch: not before the settings are known to be good

    engine = Engine.load(settings.load_config(), settings.engine_config())
    for line in engine.summary():
        print(line, flush=True)
    return build_state(
        AsyncEngine(
            engine,
            max_concurrent_requests=settings.max_concurrent_requests,
            stall_timeout_s=settings.stall_timeout,
        ),
        settings,
    )


def _server_config(state: AppState) -> uvicorn.Config:
    settings = state.settings
    return uvicorn.Config(
        create_app(state),
        host=settings.hostname,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        # Above the 60 s for which proxies keep idle connections, so that they close first.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=settings.graceful_termination_timeout,
    )


def _ready_line(host: str, port: int) -> str:
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    address = f"[{address}]" if ":" in address else address
    body = '{"inputs":"The capital of France is","parameters":{"max_new_tokens":20}}'
    return (
        f"Ready on {host}:{port}. Try: curl {address}:{port}/generate "
        f"-H 'Content-Type: application/json' -d '{body}'"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
