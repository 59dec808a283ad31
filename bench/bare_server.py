"""A bare ASGI application that sends a constant: the lower bound on the cost of a token stream.

It runs on uvicorn with uvloop and httptools, as Skiff does, with one wake of the loop per tick,
and one future and one write per stream. Whatever a server takes per token beyond this is the
server's own cost.
"""

import asyncio
from contextlib import AbstractContextManager

from starlette.types import Message, Receive, Scope, Send

from bench.http_engine import running_server

_FRAME = (
    b'data: {"index":1,"token":{"id":1234,"text":" token","logprob":-1.2345678,"special":false},'
    b'"generated_text":null,"details":null}\n\n'
)
_START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream")],
}


class BareServer:
    """Answer each request with `num_tokens` events, one at every tick."""

    def __init__(self, rate: float, num_tokens: int) -> None:
        self._interval_s = 1 / rate
        self._num_tokens = num_tokens
        self._waiting: list[asyncio.Future[None]] = []
        self._ticking: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await receive()
        await send(_START)
        loop = asyncio.get_running_loop()
        for _ in range(self._num_tokens):
            if self._ticking is None:
                self._tick(loop, loop.time())
            turn = loop.create_future()
            self._waiting.append(turn)
            await turn
            await send({"type": "http.response.body", "body": _FRAME, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _tick(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        waiting, self._waiting = self._waiting, []
        for turn in waiting:
            turn.set_result(None)
        self._ticking = loop.call_at(due, self._tick, loop, due + self._interval_s)


def serving_bare(rate: float, num_tokens: int) -> AbstractContextManager[str]:
    """Run a bare server in this process, and yield its URL."""
    return running_server(BareServer(rate, num_tokens), lifespan="off")
