"""uvicorn with the settings that Skiff runs it with, and an orderly shutdown."""

import asyncio
import os
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE

from api.http.connections import Connections, Patience, connection_limit
from api.http.listener import Listener
from api.http.protocol import Connection
from api.telemetry.logs import stopping
from engine.async_engine import AsyncEngine

_FAIL_BEFORE_CUT_S = 0.5
"""Unfinished requests fail this long before uvicorn cuts their connections, so that a stream ends
with an error event."""


PATIENCE = Patience()


class Server(uvicorn.Server):
    """A server that lets requests finish before it ends. `engine` is None until it is loaded."""

    engine: AsyncEngine | None = None

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
        if self.should_exit:
            os._exit(128 + sig)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
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
