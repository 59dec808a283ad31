"""Two ways to call the application in the same process, without a socket."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import orjson
from fastapi import FastAPI

from api.app import create_app
from api.generation.state import build_state
from api.settings.config import Settings
from tests.api.scripted import ScriptedEngine


def make_app(engine: ScriptedEngine, **settings: Any) -> FastAPI:
    return create_app(build_state(engine, Settings(**settings)))  # type: ignore[arg-type]


@asynccontextmanager
async def client(engine: ScriptedEngine, **settings: Any) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(make_app(engine, **settings))
    async with httpx2.AsyncClient(transport=transport, base_url="http://skiff") as http:
        yield http


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


class Connection:
    """A client with one request over bare ASGI, which can go away at any moment.

    With `partial` its body never ends. It reads only the first `num_reads` messages, if given.
    """

    def __init__(
        self,
        app: FastAPI,
        path: str,
        body: object,
        partial: bool = False,
        num_reads: int | None = None,
    ) -> None:
        self.sent: list[Any] = []
        self._gone = asyncio.Event()
        self._num_reads = num_reads
        self._messages = [
            {"type": "http.request", "body": orjson.dumps(body), "more_body": partial}
        ]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
        }
        self._call = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def go_away(self) -> None:
        """Close the connection, and return when the application has dropped the request."""
        self._gone.set()
        await self.finished()

    async def finished(self) -> None:
        await asyncio.wait_for(self._call, 1)

    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def _receive(self) -> Any:
        if self._messages:
            return self._messages.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if len(self.sent) == self._num_reads:
            await asyncio.Event().wait()
        self.sent.append(message)
