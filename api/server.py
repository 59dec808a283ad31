"""uvicorn with the settings that Skiff runs it with, and an orderly shutdown."""

import asyncio
import os
import socket
import sys
import threading
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE

from api.http.connections import Connections, Patience, connection_limit
from api.http.listener import Listener
from api.http.protocol import Connection
from api.supervisor import LOST
from api.telemetry.logs import stopping
from engine.async_engine import AsyncEngine

_FAIL_BEFORE_CUT_S = 0.5
"""Unfinished requests fail this long before uvicorn cuts their connections, so that a stream ends
with an error event."""
_LAST_WORDS_S = 2
"""Seconds that answers get to be sent in after the engine has died, when none can still succeed."""

PATIENCE = Patience()


class Server(uvicorn.Server):
    """A server that lets requests finish before it ends. `engine` is None until it is loaded."""

    engine: AsyncEngine | None = None
    closing_s = 1.0
    """Most seconds for what follows the last request: the engine's end, last traces or reports."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.exit_status = 0
        self._is_told_to_stop = False

    def attach(self, engine: AsyncEngine) -> None:
        """Take the engine, and end when it dies."""
        self.engine = engine
        engine.on_death = self._end_with_engine

    @property
    def termination_s(self) -> float:
        """The most seconds that an orderly end takes."""
        return (self.config.timeout_graceful_shutdown or 0) + self.closing_s

    @property
    def has_lost_engine(self) -> bool:
        return self.exit_status == LOST

    def _end_with_engine(self) -> None:
        """End soon, with an exit status of its own. All requests have failed already."""
        self.exit_status = LOST
        self.config.timeout_graceful_shutdown = _LAST_WORDS_S
        self.should_exit = True
        _end_within(self.termination_s, LOST)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002
        """Listen by a `Listener`, where uvicorn would have asyncio listen."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        self._connections = Connections(connection_limit(), PATIENCE)
        address = self.config.host, self.config.port
        try:
            listener = Listener(address, self._connections, self._connect, self.config.ssl)
        except OSError as error:
            await self.lifespan.shutdown()
            raise CannotListen(f"port {self.config.port}: {error.strerror}") from None
        self.servers: list[Any] = [listener]
        self.started = True

    def _connect(self) -> Connection:
        state = self.lifespan.state
        return Connection(self._connections, self.config, self.server_state, state)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin an orderly shutdown; at the second signal, end at once and in whatever state."""
        if self._is_told_to_stop:
            os._exit(128 + sig)
        self._is_told_to_stop = True
        super().handle_exit(sig, frame)
        _end_within(self.termination_s, 0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if not self.has_lost_engine:
            stopping()
        timeout_s = self.config.timeout_graceful_shutdown or 0
        give_up = asyncio.get_running_loop().call_later(
            max(timeout_s - _FAIL_BEFORE_CUT_S, 0), self._give_up
        )
        await super().shutdown(sockets)
        give_up.cancel()

    def _give_up(self) -> None:
        if self.engine is not None:
            self.engine.give_up("the server is shutting down")


def _end_within(seconds: float, status: int) -> None:
    """End the process after `seconds`, whatever it still waits for then."""
    timer = threading.Timer(seconds, os._exit, (status,))
    timer.daemon = True
    timer.start()


def server_config(
    app: ASGIApp, hostname: str, port: int, drain_s: int, **options: Any
) -> uvicorn.Config:
    """Configure uvicorn. Running requests get `drain_s` seconds to finish in at shutdown."""
    return uvicorn.Config(
        app,
        host=hostname,
        port=port,
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        # Lines of lower levels are about what single clients do.
        log_level="error",
        server_header=False,
        timeout_graceful_shutdown=drain_s,
        **options,
    )


class CannotListen(Exception):
    """The server cannot listen on its port."""


def check_port(hostname: str, port: int, setting: str) -> None:
    """Check that the port is free, before the minutes that loading a model may take.

    Raises CannotListen with the name of the `setting`.
    """
    family = socket.AF_INET6 if ":" in hostname else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((hostname, port))
        except OSError as error:
            raise CannotListen(f"{setting}: {port}: {error.strerror}") from None
