"""The stream of the answers to a chat, which a dialect's writer encodes."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Protocol

from starlette.requests import Request as HttpRequest

from api.chat.events import ChatEvent
from api.chat.generation import Events
from api.http import sse
from api.http.disconnect import until_disconnect
from api.http.errors import REQUEST_ERRORS


class ChatWriter(Protocol):
    """Writes the server-sent events of one stream in its dialect."""

    def frames(self, events: Sequence[ChatEvent]) -> bytes:
        """Return the frames of events that are pending together."""

    def error(self, problem: Exception) -> bytes:
        """Return the frame that reports one of `REQUEST_ERRORS`."""

    def end(self) -> bytes:
        """Return the frames after all others, also after an error."""


async def chat_stream(
    http: HttpRequest, events: Events, writer: ChatWriter, headers: Mapping[str, str]
) -> sse.EventStream:
    """Return the response that streams `events`, as soon as the request is admitted.

    Raises the error of a request that is refused, so that its status tells.
    """
    frames = _frames(events, writer)
    await until_disconnect(http.receive, sse.begun(frames))
    return sse.EventStream(frames, headers)


async def _frames(events: Events, writer: ChatWriter) -> AsyncGenerator[bytes, None]:
    """Yield an empty piece when the request is admitted, then the frames of each list of events."""
    is_admitted = False
    try:
        async with aclosing(events):
            async for pending in events:
                if not is_admitted:
                    is_admitted = True
                    yield b""
                if frames := writer.frames(pending):
                    yield frames
    except REQUEST_ERRORS as problem:
        if not is_admitted:
            raise
        yield writer.error(problem)
    yield writer.end()
