"""Server-sent events in TGI's framing, and the streaming response that sends them.

Each frame is encoded once; the response adds only one `send` per event.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.http.disconnect import ClientGone, until_disconnect

KEEP_ALIVE = b":\n\n"
DONE = b"data: [DONE]\n\n"
"""The last event of every OpenAI stream, also after an error."""
_ESCAPES = {char.encode(): b"\\u%04x" % ord(char) for char in "\x85\u2028\u2029"}
_LINE_BREAK = re.compile(b"|".join(_ESCAPES))


def event(payload: object) -> bytes:
    """Return `payload` as one event."""
    return b"data: " + orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n\n"


def typed_event(payload: Mapping[str, object]) -> bytes:
    """Return `payload` as one event that is named by its `type`."""
    return f"event: {payload['type']}\n".encode() + event(payload)


async def begun(frames: AsyncGenerator[bytes, None]) -> None:
    """Run `frames` up to its first frame, which is dropped: it tells that the request is admitted.
    Raises what it raises before, so that this can be told by the status.
    """
    await anext(frames)


def _on_one_line(frame: bytes) -> bytes:
    """Escape the line breaks that JSON allows in its strings.

    Python's `str.splitlines`, by which many clients read a stream, ends a line at each of them.
    """
    if frame.isascii():
        return frame
    return _LINE_BREAK.sub(lambda found: _ESCAPES[found[0]], frame)


class EventStream(Response):
    """Sends the frames, and a keep-alive comment after `keep_alive_s` seconds without one.

    A frame has characters other than ASCII only within JSON strings. When the client disconnects,
    `frames` is closed at once, even while it is waiting.
    """

    keep_alive_s = 15.0

    def __init__(self, frames: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        # Response.__init__ is not called: it would set a content-length of 0.
        self.status_code = 200
        self.background = None
        self.init_headers(
            {"content-type": "text/event-stream", "cache-control": "no-cache", **headers}
        )
        self._frames = frames
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        async with aclosing(self._frames):
            with suppress(ClientGone):
                await until_disconnect(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        keeper = asyncio.create_task(self._keep_alive(send))
        try:
            async for frame in self._frames:
                await self._write(send, _on_one_line(frame))
        finally:
            keeper.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, chunk: bytes) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _keep_alive(self, send: Send) -> None:
        """Send keep-alive comments. One timer covers many events, instead of one per event."""
        loop = asyncio.get_running_loop()
        self._last_sent = loop.time()
        while True:
            silent_s = loop.time() - self._last_sent
            if silent_s >= self.keep_alive_s:
                await self._write(send, KEEP_ALIVE)
            else:
                await asyncio.sleep(self.keep_alive_s - silent_s)
