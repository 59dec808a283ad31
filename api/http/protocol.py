"""One HTTP connection: uvicorn's, with limits on what its client may send and how long it takes."""

import asyncio
from typing import Any

from starlette.responses import PlainTextResponse
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from api.http.connections import Connections, Phase

_MAX_HEADERS = 100
"""Most headers of a request, as in TGI's server."""
_MAX_HEAD_BYTES = 1 << 16
_MAX_DROPPED_BYTES = 64 << 20
"""Most bytes of an answered request that are read and dropped. Then its connection is closed."""

_TOO_LARGE = "The headers are too large."
_TOO_MANY = PlainTextResponse("Too many connections are open.", 503, {"connection": "close"})


class _TooMuch(Exception):
    """The headers of a request are too many or too long."""


class _Outlet:
    """A transport for uvicorn. Closing it leaves the way of closing to the connection."""

    def __init__(self, connection: "Connection", transport: asyncio.Transport) -> None:
        self.is_closed = False
        self.write = transport.write
        self._connection = connection
        self._transport = transport

    def is_closing(self) -> bool:
        return self.is_closed or self._transport.is_closing()

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._connection.finish(self._transport)


class Connection(HttpToolsProtocol):
    """A connection that keeps its phase in `Connections`, from its construction on, which is before
    the handshake.
    """

    transport: Any

    def __init__(
        self,
        connections: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
    ) -> None:
        super().__init__(config, server_state, app_state, asyncio.get_running_loop())
        self._connections = connections
        self._is_spare = connections.is_full
        self._opening: asyncio.Future[Any] | None = None
        self._raw_transport: asyncio.Transport | None = None
        self._arriving: Phase | None = None
        """HEAD or BODY: the part of a request that the client is sending."""
        self._num_received = 0
        self._num_received_before = 0
        self._num_headers = 0
        self._num_head_bytes = 0
        self._refusal = 400
        self._phase: Phase | None = None
        self._enter(Phase.HANDSHAKE)

    def open_by(self, opening: asyncio.Future[Any]) -> None:
        """Take the task that opens the connection, to cancel it if it is closed before that."""
        self._opening = opening
        opening.add_done_callback(self._opened)

    def _opened(self, opening: asyncio.Future[Any]) -> None:
        # Clients that break off a handshake are no news.
        if opening.cancelled() or opening.exception() is not None:
            self._leave()

    def _enter(self, phase: Phase) -> None:
        if phase is not self._phase:
            self._phase = phase
            self._num_received_before = self._num_received
            self._connections.enter(self, phase)

    def _leave(self) -> None:
        self._phase = None
        self._connections.remove(self)

    def _settle(self) -> None:
        """Enter the phase that the connection is in after something happened to it."""
        if self._phase is None or self.transport.is_closing():
            return
        answers = bool(self.pipeline) or not (self.cycle is None or self.cycle.response_complete)
        if self.flow.write_paused:
            self._enter(Phase.UNREAD)
        elif answers:
            is_body = self._arriving is Phase.BODY and not self.pipeline
            self._enter(Phase.BODY if is_body else Phase.ANSWER)
        elif self._arriving is Phase.BODY:
            self._enter(Phase.DROPPED)
        else:
            self._enter(self._arriving or Phase.IDLE)

    # -- what Connections asks for ---------------------------------------------

    def progress(self, phase: Phase) -> int:
        if phase in (Phase.UNREAD, Phase.CLOSING) and self._raw_transport is not None:
            return -self._raw_transport.get_write_buffer_size()
        return self._num_received

    def expire(self, phase: Phase) -> None:
        if phase is Phase.BODY and self.flow.read_paused:
            self._connections.enter(self, phase)  # it is the server that does not read
        elif phase in (Phase.HEAD, Phase.BODY):
            self._refuse(408, "The request took too long to arrive.")
        elif phase is Phase.IDLE:
            self.transport.close()
        else:
            self.drop()

    def drop(self) -> None:
        self._leave()
        if self._raw_transport is not None:
            self._raw_transport.abort()
        elif self._opening is not None:
            self._opening.cancel()

    # -- what the transport calls -------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._raw_transport = transport
        self.transport = _Outlet(self, transport)
        if self._phase is None:
            transport.abort()
        else:
            self._enter(Phase.IDLE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self.transport.is_closed = True
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_received += len(data)
        if not self.transport.is_closing():
            super().data_received(data)
            self._settle()
        num_received = self._num_received - self._num_received_before
        if self._phase is Phase.DROPPED and num_received > _MAX_DROPPED_BYTES:
            self.drop()
        elif self._phase is Phase.HEAD and num_received > _MAX_HEAD_BYTES:
            self._refuse(431, _TOO_LARGE)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._settle()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._settle()

    def finish(self, transport: asyncio.Transport) -> None:
        """Close `transport` once the client has read what was sent.

        While the client sends a request, closing would reset the connection, and the client might
        never see its answer. So the rest of the request is read and dropped first.
        """
        if self._phase is None:
            transport.close()
        elif self._arriving is None:
            self._enter(Phase.CLOSING)
            transport.close()
        else:
            self._enter(Phase.DROPPED)
            self.flow.resume_reading()
            if transport.can_write_eof():
                transport.write_eof()

    def shutdown(self) -> None:
        if self._phase in (Phase.HEAD, Phase.DROPPED):
            self.drop()
        else:
            super().shutdown()

    # -- what the parser calls ----------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._arriving = Phase.HEAD
        self._num_headers = self._num_head_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def _count_head(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_headers > _MAX_HEADERS or self._num_head_bytes > _MAX_HEAD_BYTES:
            self._refusal = 431
            raise _TooMuch

    def on_headers_complete(self) -> None:
        if self._is_spare:
            is_get = self.parser.get_method() in (b"GET", b"HEAD")
            self.app = self.config.loaded_app if is_get else _TOO_MANY
        super().on_headers_complete()
        self._arriving = Phase.BODY

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._arriving = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # `Connections` has the time limits
        self._settle()

    # -- refusals ---------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Answer a request that the parser refuses."""
        self._refuse(self._refusal, _TOO_LARGE if self._refusal == 431 else msg)

    def _refuse(self, status: int, text: str) -> None:
        """Answer without the application, which learns that its client is gone, and close."""
        cycle = self.cycle
        is_answering = cycle is not None and not cycle.response_complete
        if is_answering and (cycle.response_started or self.pipeline):
            self.drop()
            return
        headers = {b"content-type": b"text/plain; charset=utf-8", b"connection": b"close"}
        headers |= {b"content-length": str(len(text)).encode()}
        headers |= dict(self.server_state.default_headers)
        lines = b"".join(b"%s: %s\r\n" % header for header in headers.items())
        self.transport.write(STATUS_LINE[status] + lines + b"\r\n" + text.encode())
        if is_answering:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()
