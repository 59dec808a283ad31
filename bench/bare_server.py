"""The least that a token stream costs: a bare ASGI application that sends a constant.

uvicorn with uvloop and httptools as Skiff runs them, one wake of the loop per tick, one future
and one write per stream. What a server's time per token is beyond this one's is its own.
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
    """Each request gets `num_tokens` events, one a tick."""

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
    """Yields the URL."""
    return running_server(BareServer(rate, num_tokens), lifespan="off")
