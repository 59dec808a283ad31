"""Accepts connections, and makes room for them when there are too many."""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any

from api.http.connections import SWEEP_INTERVAL_S, Connections
from api.http.protocol import Connection

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_ACCEPTED_AT_ONCE = 32
"""Connections accepted before the event loop does something else."""
_PAUSE_S = 0.1
"""Seconds until the next try, after the process could not open another file."""
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener:
    """A listening socket, in the shape of an `asyncio.Server`, as far as uvicorn knows that.

    asyncio's own server cannot be told how many connections to accept, and does not show those in
    the handshake of TLS.
    """

    def __init__(
        self,
        address: tuple[str, int],
        connections: Connections,
        connect: Callable[[], Connection],
        context: ssl.SSLContext | None,
    ) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._socket = socket.create_server(address, family=family, backlog=_BACKLOG)
        self._socket.setblocking(False)
        self._connections = connections
        self._connect = connect
        self._options: dict[str, Any] = {}
        if context is not None:
            patience = connections.patience
            self._options = {"ssl": context, "ssl_handshake_timeout": patience.handshake_s}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._accept)
        self._sweeping = asyncio.create_task(self._sweep())

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        return (self._socket,)

    def close(self) -> None:
        """Stop listening. Open connections stay open."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    async def wait_closed(self) -> None:
        self._sweeping.cancel()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            try:
                self._connections.sweep()
            except Exception:
                logger.exception("overdue connections were not closed")

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                accepted, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_FILES:
                    raise
                self._connections.shrink()
                self._pause()
                return
            self._open(accepted)
            if self._connections.is_full:
                return  # what has been closed for these gives its file back in the next round

    def _open(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        self._connections.make_room()
        connection = self._connect()
        opening = self._loop.connect_accepted_socket(lambda: connection, accepted, **self._options)
        connection.open_by(self._loop.create_task(opening))

    def _pause(self) -> None:
        """Accept nothing for a moment, in which the files of closed connections become free. The
        socket stays readable, so the event loop would spin.
        """
        self._loop.remove_reader(self._socket)
        self._loop.call_later(_PAUSE_S, self._resume)

    def _resume(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket, self._accept)
