"""The HTTP client of a load run: it records when each token of a request arrived.

The client speaks the server-sent events of TGI and of OpenAI, and shares no code with the
server. It runs on the machine that it measures, so it does little for each event: it finds the
end of the event and records the time. Only the last events of a stream are decoded. A response
must be framed by HTTP (chunked, or with a length), and its events by "\\n\\n".
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import orjson

from bench.report import RequestRecord
from bench.workload import LoadPlan, Prompt


class LoadError(Exception):
    """The load run could not start: the server is unreachable or fails a warm-up request."""


# Reading a stream.

_END = b"\n\n"
"""The end of an event."""

_ERRORS = (b'data: {"error"', b'data:{"error"')


@dataclass(slots=True)
class _Stream:
    """A response so far: when its events arrived, and the events that tell how it went.

    Events are handled when they arrive. Handling them at the end of their request would delay
    the reads of all others (0.8 ms for 512 events), just when a closed loop waits for the first
    tokens of the next requests.

    status  HTTP status; 0 if the response did not begin
    rest    bytes after the last event: the whole body if it has no events
    broken  why the response did not end properly
    """

    status: int = 0
    times_s: list[float] = field(default_factory=list)
    first: bytes = b""
    last: deque[bytes] = field(default_factory=partial(deque, maxlen=2))
    error: bytes = b""
    rest: bytes = b""
    broken: str | None = None

    def feed(self, piece: bytes, read_s: float) -> None:
        """Add the bytes of one read, which may end anywhere. Comments are dropped."""
        events = (self.rest + piece).split(_END)
        self.rest = events.pop()
        for event in events:
            if event.startswith(b"data:"):
                self.times_s.append(read_s)
                self.last.append(event)
                if not self.first:
                    self.first = event
                if event.startswith(_ERRORS):
                    self.error = event


class _StreamError(Exception):
    """The response is not a complete stream of tokens; the message says what came instead."""


# Dialects: the body of a request, and how to tell that a stream is complete.


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A complete stream: the times of its token events, and the server's counts if it sent any."""

    times_s: list[float]
    num_input: int | None
    num_output: int | None


@dataclass(frozen=True, slots=True)
class _Dialect:
    path: str
    body: Callable[[LoadPlan, Prompt], dict[str, object]]
    read: Callable[[_Stream], _Tokens]


def _tgi_body(plan: LoadPlan, prompt: Prompt) -> dict[str, object]:
    parameters: dict[str, object] = {"max_new_tokens": prompt.max_output_tokens, "details": True}
    if plan.temperature:
        parameters |= {"do_sample": True, "temperature": plan.temperature, "seed": prompt.seed}
    return {"inputs": prompt.text, "parameters": parameters}


def _completions_body(plan: LoadPlan, prompt: Prompt) -> dict[str, object]:
    return {"prompt": prompt.text, **_openai_options(plan, prompt)}


def _chat_body(plan: LoadPlan, prompt: Prompt) -> dict[str, object]:
    messages = [{"role": "user", "content": prompt.text}]
    return {"messages": messages, **_openai_options(plan, prompt)}


def _openai_options(plan: LoadPlan, prompt: Prompt) -> dict[str, object]:
    return {
        "model": plan.model,
        "max_tokens": prompt.max_output_tokens,
        "temperature": plan.temperature,
        "seed": prompt.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _read_tgi(stream: _Stream) -> _Tokens:
    """Read TGI's stream: every event is a token; the last has the whole text and the counts."""
    final = _decoded(stream.last[-1]) if stream.last else {}
    if not isinstance(final.get("generated_text"), str):
        raise _StreamError("no final event")
    details = final.get("details") or {}
    return _Tokens(stream.times_s, details.get("input_length"), details.get("generated_tokens"))


def _read_openai(stream: _Stream) -> _Tokens:
    """Read OpenAI's stream: chunks, then [DONE].

    The last chunk has the usage, and in some servers no token.
    """
    if len(stream.last) < 2 or _data(stream.last[-1]) != b"[DONE]":
        raise _StreamError("no final event")
    start, end = 0, len(stream.times_s) - 1
    last_chunk = _decoded(stream.last[0])
    usage = last_chunk.get("usage") or {}
    if not last_chunk.get("choices"):
        end -= 1
    num_output = usage.get("completion_tokens")
    # Some servers open a chat with a chunk that has a role and no token. TGI's first token can
    # look the same (half a character), but then there are as many events as the usage says.
    if end != num_output and _has_only_role(stream.first):
        start = 1
    if start >= end:
        raise _StreamError("no token")
    return _Tokens(stream.times_s[start:end], usage.get("prompt_tokens"), num_output)


def _has_only_role(event: bytes) -> bool:
    choices = _decoded(event).get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    return "role" in delta and not delta.get("content")


def _decoded(event: bytes) -> dict[str, Any]:
    try:
        decoded = orjson.loads(_data(event))
    except orjson.JSONDecodeError:
        decoded = None
    if not isinstance(decoded, dict):
        raise _StreamError(f"an event is not a JSON object: {_excerpt(event)}")
    return decoded


def _data(event: bytes) -> bytes:
    return event.removeprefix(b"data:").strip()


_DIALECTS = {
    "tgi": _Dialect("/generate_stream", _tgi_body, _read_tgi),
    "completions": _Dialect("/v1/completions", _completions_body, _read_openai),
    "chat": _Dialect("/v1/chat/completions", _chat_body, _read_openai),
}


# The client: it keeps connections open, with one request at a time on each.

_MAX_IDLE_S = 1.0
"""Connections idle for longer are not reused: the server may close them (uvicorn after 5 s)."""


@dataclass(frozen=True, slots=True)
class Server:
    host: str
    port: int
    authority: str
    prefix: str

    @classmethod
    def parse(cls, url: str) -> "Server":
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"cannot use {url!r} as a server: write it as http://127.0.0.1:8080")
        return cls(parts.hostname, parts.port or 80, parts.netloc, parts.path.rstrip("/"))


@dataclass(frozen=True, slots=True)
class Request:
    payload: bytes
    num_words: int
    max_output_tokens: int


class _Connection(asyncio.Protocol):
    """Owns one socket. Each event runs `data_received` and `on_body`, and nothing else.

    With 64 streams an event costs 12 to 15 microseconds. uvloop with a handler that does nothing
    takes 9 to 11 of them, mostly the kernel's read of the socket.
    """

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._stream = _Stream()
        self._ended: asyncio.Future[None] | None = None
        self._read_s = 0.0
        self._idle_since_s = time.perf_counter()
        self._is_open = True

    @property
    def is_reusable(self) -> bool:
        return self._is_open and time.perf_counter() - self._idle_since_s < _MAX_IDLE_S

    async def exchange(self, payload: bytes, stream: _Stream) -> None:
        """Send a request and read its response into `stream`, until it ends or fails."""
        assert self._transport is not None
        assert self._ended is None
        self._stream = stream
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(payload)
        await self._ended

    def close(self) -> None:
        self._is_open = False  # at once: `connection_lost` runs one turn of the loop later
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio's.
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._is_open = False
        self._end(
            "connection closed before the end" if error is None else f"connection lost ({error})"
        )

    def data_received(self, data: bytes) -> None:
        self._read_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.close()
            self._end(f"not an HTTP answer ({error})")

    def on_headers_complete(self) -> None:
        self._stream.status = self._parser.get_status_code()

    def on_body(self, piece: bytes) -> None:
        self._stream.feed(piece, self._read_s)

    def on_message_complete(self) -> None:
        self._is_open = self._parser.should_keep_alive()
        self._idle_since_s = self._read_s
        self._end(None)

    def _end(self, broken: str | None) -> None:
        ended, self._ended = self._ended, None
        if ended is not None and not ended.done():  # done: cancelled by the timeout
            self._stream.broken = broken
            ended.set_result(None)


class Client:
    """Owns the connections, one for each concurrent request; the last used is reused first."""

    def __init__(self, server: Server, plan: LoadPlan) -> None:
        self._server = server
        self._plan = plan
        self._dialect = _DIALECTS[plan.api]
        self._idle: list[_Connection] = []

    def prepare(self, prompts: Sequence[Prompt]) -> list[Request]:
        """Build the requests in advance, before the clock starts."""
        return [
            Request(self._payload(prompt), prompt.num_words, prompt.max_output_tokens)
            for prompt in prompts
        ]

    async def open(self, num_connections: int) -> None:
        """Connect in advance, so that the first requests of a closed loop need not wait."""
        self.close()
        try:
            for _ in range(num_connections):
                self._idle.append(await self._connect())
        except OSError as error:
            raise LoadError(f"cannot reach {self._server.authority}: {error}") from error

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def send(self, request: Request) -> RequestRecord:
        """Never raises for what the server does: that is what the record's `error` is for."""
        start_s = time.perf_counter()
        stream = _Stream()
        try:
            async with asyncio.timeout(self._plan.timeout_s):
                await self._exchange(request.payload, stream)
        except TimeoutError:
            stream.broken = f"no whole answer within {self._plan.timeout_s} s"
        except OSError as error:
            stream.broken = f"cannot connect ({error})"
        return _record(request, start_s, stream, self._dialect)

    def _payload(self, prompt: Prompt) -> bytes:
        body = orjson.dumps(self._dialect.body(self._plan, prompt))
        head = (
            f"POST {self._server.prefix}{self._dialect.path} HTTP/1.1\r\n"
            f"Host: {self._server.authority}\r\n"
            "Accept: text/event-stream\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def _exchange(self, payload: bytes, stream: _Stream) -> None:
        connection = await self._acquire()
        try:
            await connection.exchange(payload, stream)
        except asyncio.CancelledError:
            connection.close()
            raise
        if connection.is_reusable:
            self._idle.append(connection)
        else:
            connection.close()

    async def _acquire(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection
            connection.close()
        return await self._connect()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            _Connection, self._server.host, self._server.port
        )
        return connection


def _record(request: Request, start_s: float, stream: _Stream, dialect: _Dialect) -> RequestRecord:
    try:
        tokens = _tokens(stream, dialect)
    except _StreamError as error:
        return RequestRecord(
            start_s,
            stream.times_s,
            input_tokens=request.num_words,
            output_tokens=len(stream.times_s),
            max_output_tokens=request.max_output_tokens,
            error=str(error),
        )
    return RequestRecord(
        start_s,
        tokens.times_s,
        input_tokens=request.num_words if tokens.num_input is None else tokens.num_input,
        output_tokens=len(tokens.times_s) if tokens.num_output is None else tokens.num_output,
        max_output_tokens=request.max_output_tokens,
        counted_by_server=None not in (tokens.num_input, tokens.num_output),
    )


def _tokens(stream: _Stream, dialect: _Dialect) -> _Tokens:
    if stream.status not in (0, 200):
        raise _StreamError(f"HTTP {stream.status}: {_excerpt(stream.rest)}")
    if stream.error:
        raise _StreamError(f"error event: {_excerpt(_data(stream.error))}")
    if stream.broken is not None:
        raise _StreamError(stream.broken)
    return dialect.read(stream)


def _excerpt(data: bytes) -> str:
    return data[:200].decode(errors="replace").strip()
