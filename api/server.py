"""uvicorn with the settings that Skiff runs it with, and an orderly shutdown."""

import asyncio
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from api.telemetry.logs import stopping
from engine.async_engine import AsyncEngine

_FAIL_BEFORE_CUT_S = 0.5
"""Unfinished requests fail this long before uvicorn cuts their connections, so that a stream ends
with an error event."""


class Server(uvicorn.Server):
    """A server that lets requests finish before it ends. `engine` is None until it is loaded."""

    engine: AsyncEngine | None = None

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
        log_level="warning",
        server_header=False,
        # Proxies keep idle connections for 60 s. They should be the ones to close them.
        timeout_keep_alive=75,
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
