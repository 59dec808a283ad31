"""uvicorn as Skiff runs it, and how it ends."""

import asyncio
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from api.telemetry.logs import stopping
from engine.async_engine import AsyncEngine

_LAST_WORDS_S = 0.5
"""Before streams are cut they end, with an error as their last event."""


class Server(uvicorn.Server):
    """`engine` is whose requests it serves; None while there is none yet."""

    engine: AsyncEngine | None = None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping()
        timeout_s = self.config.timeout_graceful_shutdown or 0
        last_words = asyncio.get_running_loop().call_later(
            max(timeout_s - _LAST_WORDS_S, 0), self._give_up
        )
        await super().shutdown(sockets)
        last_words.cancel()

    def _give_up(self) -> None:
        if self.engine is not None:
            self.engine.give_up("the server is shutting down")


def server_config(
    app: ASGIApp, hostname: str, port: int, drain_s: int, **options: Any
) -> uvicorn.Config:
    """`drain_s` is what running requests get to finish in."""
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
        # Above the 60 s for which proxies keep idle connections, so that they close first.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=drain_s,
        **options,
    )


class CannotListen(Exception):
    """Nothing can be served where it should be."""


def check_port(hostname: str, port: int, setting: str) -> None:
    """Before the minutes that a model may take to load, not after. Raises CannotListen, which names
    the setting.
    """
    family = socket.AF_INET6 if ":" in hostname else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((hostname, port))
        except OSError as error:
            raise CannotListen(f"{setting}: {port}: {error.strerror}") from None
