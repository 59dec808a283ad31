"""The loop of every streaming route: it turns the deliveries of one generation into frames."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from api.http.errors import REQUEST_ERRORS
from engine.core.request import Delivery, Finished, TokenOutput


class FrameWriter(Protocol):
    """Writes the server-sent events of one stream in the format of its route."""

    def token(self, output: TokenOutput) -> bytes:
        """Return the frame of a token that is not the last one."""

    def last(self, output: TokenOutput, end: Finished) -> bytes:
        """Return the frames of the last token and of the end."""

    def error(self, problem: Exception) -> bytes:
        """Return the frame that reports one of `REQUEST_ERRORS`."""


async def stream_frames(
    stream: AsyncGenerator[Delivery, None], writer: FrameWriter
) -> AsyncGenerator[bytes, None]:
    """Yield the frames of each delivery in one piece, so that they become one write.

    A piece is empty if `writer` returns no frame for any of its tokens. An error is the last
    frame. Closing this generator closes `stream`.
    """
    try:
        async with aclosing(stream):
            async for tokens, end in stream:
                if isinstance(end, Finished):
                    frames = [writer.token(output) for output in tokens[:-1]]
                    frames.append(writer.last(tokens[-1], end))
                else:
                    frames = [writer.token(output) for output in tokens]
                yield b"".join(frames)
    except REQUEST_ERRORS as problem:
        yield writer.error(problem)
