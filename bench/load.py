"""The HTTP load generator: streams of tokens in, the figures of `vllm bench serve` out.

    python -m bench.load --url http://127.0.0.1:8080 --api tgi --concurrency 16
    python -m bench.load --url http://127.0.0.1:8080 --vs http://127.0.0.1:8081 --rate 4

Speaks TGI's and OpenAI's server-sent events and knows nothing of the server's code. The
client shares the machine with the server that it measures, so an event is told from the
next, timed and let go; only the last ones of a stream are decoded. An answer must be
framed by HTTP (chunked or a length), its events by "\\n\\n".

Prompts are made without a tokenizer, of words that are one token each in the usual
English vocabularies: their length is true to about a token, and the report counts what
the server says it read.
"""

import argparse
import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import orjson
import uvloop

from bench.report import (
    RequestRecord,
    Summary,
    ratios,
    records_json,
    summarise,
    summary_json,
    summary_table,
    versus_table,
)


class LoadError(Exception):
    """The load could not be put on the server at all."""


@dataclass(frozen=True, slots=True)
class LengthMix:
    """A distribution of lengths: weighted uniform ranges, both ends included."""

    text: str
    ranges: tuple[tuple[float, int, int], ...]

    @classmethod
    def parse(cls, text: str) -> "LengthMix":
        """`128`, `64:256`, or a mix such as `0.7*32:64+0.3*512`."""
        try:
            ranges = tuple(_parse_range(part) for part in text.split("+"))
        except ValueError:
            raise _lengths_error(text) from None
        if abs(sum(weight for weight, _, _ in ranges) - 1) > 1e-6:
            raise _lengths_error(text)
        return cls(text, ranges)

    def sample(self, rng: Random) -> int:
        weights = [weight for weight, _, _ in self.ranges]
        _, low, high = rng.choices(self.ranges, weights)[0]
        return rng.randint(low, high)


def _parse_range(text: str) -> tuple[float, int, int]:
    weight_text, star, lengths = text.rpartition("*")
    low_text, colon, high_text = lengths.partition(":")
    weight = float(weight_text) if star else 1.0
    low = int(low_text)
    high = int(high_text) if colon else low
    if not (0 < weight <= 1 and 1 <= low <= high):
        raise ValueError
    return weight, low, high


def _lengths_error(text: str) -> ValueError:
    return ValueError(
        f"cannot read {text!r} as a length: write 128, or 64:256 for any length from 64 to "
        "256, or 0.7*32:64+0.3*512 for a mix whose weights sum to 1; lengths are at least 1"
    )


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is asked of a server and how it arrives; the seed decides every choice.

    A server that has seen a seed's prompts may answer them from its prefix cache: give
    another seed to the next run.

    Closed loop with `concurrency` (each slot sends its next request when the last is
    done), open loop with `rate` (Poisson arrivals per second): exactly one is given.

    Every prompt opens with `shared_prefix_len` words beyond its `input_len`: the same
    words in about `shared_fraction` of the requests, words of their own in the others,
    so that the fraction changes what can be reused and not how much is asked.
    """

    api: str
    num_requests: int
    input_len: LengthMix
    output_len: LengthMix
    concurrency: int | None = None
    rate: float | None = None
    shared_prefix_len: int = 0
    shared_fraction: float = 1.0
    seed: int = 0
    warmup: int = 0
    temperature: float = 0.0
    model: str = "tgi"
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for holds, complaint in (
            (self.api in _DIALECTS, f"api must be one of {', '.join(_DIALECTS)}"),
            ((self.concurrency is None) != (self.rate is None), "give one of concurrency, rate"),
            (self.concurrency is None or self.concurrency >= 1, "concurrency must be 1 or more"),
            (self.rate is None or self.rate > 0, "rate must be above 0 requests per second"),
            (self.num_requests >= 1, "num-requests must be 1 or more"),
            (self.shared_prefix_len >= 0, "shared-prefix-len must be 0 or more"),
            (0 <= self.shared_fraction <= 1, "shared-fraction must be between 0 and 1"),
            (self.warmup >= 0, "warmup must be 0 or more"),
            (self.temperature >= 0, "temperature must be 0 (greedy) or more"),
            (self.timeout_s > 0, "timeout-s must be above 0"),
        ):
            if not holds:
                raise ValueError(complaint)


@dataclass(frozen=True, slots=True)
class LoadResult:
    url: str
    plan: LoadPlan
    records: tuple[RequestRecord, ...]
    summary: Summary


async def run_load(url: str, plan: LoadPlan) -> LoadResult:
    """Put the load on the server; failed requests are counted in the result.

    Raises LoadError where there is nothing to measure: the server cannot be reached, or
    a warm-up request fails.
    """
    server = _Server.parse(url)
    warmups, requests = _requests(plan, server)
    client = _Client(server, _DIALECTS[plan.api], plan.timeout_s)
    try:
        await _warm_up(client, warmups, plan.concurrency or len(warmups))
        await client.open(plan.concurrency or 1)
        # Of this thread: a caller may run its server in another one.
        cpu_start_s, start_s = time.thread_time(), time.perf_counter()
        if plan.concurrency is not None:
            records = await _closed_loop(client, requests, plan.concurrency)
        else:
            records = await _open_loop(client, requests, arrivals(plan))
        duration_s = time.perf_counter() - start_s
        client_cpu_s = time.thread_time() - cpu_start_s
    finally:
        client.close()
    return LoadResult(url, plan, tuple(records), summarise(records, duration_s, client_cpu_s))


async def run_versus(
    url_a: str, url_b: str, plan: LoadPlan, num_rounds: int
) -> AsyncIterator[tuple[LoadResult, LoadResult]]:
    """Alternate two servers, so that a drift of the machine falls on both.

    Both answer the same requests within a round and new ones in the next: a prompt seen
    in the last round would come from the prefix cache.
    """
    for number in range(num_rounds):
        of_round = replace(plan, seed=plan.seed + number)
        yield await run_load(url_a, of_round), await run_load(url_b, of_round)


# The workload: every request is made before the clock starts.

_VOCABULARY = """
time people water world house point place case part group number problem fact month night
week year day hand side line head home room area money story family system program question
work government country state company service market party law book word business issue kind
power game car city name team minute idea body level office door person art war history
result reason research girl food moment air teacher force education
"""
_WORDS = _VOCABULARY.split()


@dataclass(frozen=True, slots=True)
class _Request:
    payload: bytes
    num_words: int
    max_output_tokens: int


def arrivals(plan: LoadPlan) -> Iterator[float]:
    """When each request of an open loop is sent, in seconds from the start."""
    assert plan.rate is not None
    rng = Random(f"{plan.seed}:arrivals")
    now_s = 0.0
    for _ in range(plan.num_requests):
        now_s += rng.expovariate(plan.rate)
        yield now_s


def _requests(plan: LoadPlan, server: "_Server") -> tuple[list[_Request], list[_Request]]:
    """Warm-ups and requests: other prompts, the same shared prefix, as in a steady state."""
    prefix = Random(f"{plan.seed}:prefix").choices(_WORDS, k=plan.shared_prefix_len)
    warmup_rng, rng = Random(f"{plan.seed}:warmup"), Random(f"{plan.seed}:requests")
    return (
        [_request(plan, server, prefix, warmup_rng) for _ in range(plan.warmup)],
        [_request(plan, server, prefix, rng) for _ in range(plan.num_requests)],
    )


def _request(plan: LoadPlan, server: "_Server", prefix: list[str], rng: Random) -> _Request:
    is_shared = rng.random() < plan.shared_fraction
    opening = prefix if is_shared else rng.choices(_WORDS, k=len(prefix))
    words = opening + rng.choices(_WORDS, k=plan.input_len.sample(rng))
    num_tokens = plan.output_len.sample(rng)
    dialect = _DIALECTS[plan.api]
    body = dialect.body(plan, " ".join(words), num_tokens, rng.getrandbits(32))
    payload = _http_request(server, dialect.path, orjson.dumps(body))
    return _Request(payload, len(words), num_tokens)


def _http_request(server: "_Server", path: str, body: bytes) -> bytes:
    head = (
        f"POST {server.prefix}{path} HTTP/1.1\r\n"
        f"Host: {server.authority}\r\n"
        "Accept: text/event-stream\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


# Streams, as they are read.

_END = b"\n\n"
"""Of an event."""

_ERRORS = (b'data: {"error"', b'data:{"error"')


@dataclass(slots=True)
class _Stream:
    """An answer so far: when its events came, and those few of them that tell how it went.

    Events are dealt with as they come. Left until their request is over they would hold up
    the reads of all others (0.8 ms for 512 events), just when a closed loop waits for the
    first tokens of the next requests.

    `rest` is what follows the last event: all of an answer that has none. `broken` says why
    an answer did not come to its end; `status` is 0 where it did not begin.
    """

    status: int = 0
    times_s: list[float] = field(default_factory=list)
    first: bytes = b""
    last: deque[bytes] = field(default_factory=partial(deque, maxlen=2))
    error: bytes = b""
    rest: bytes = b""
    broken: str | None = None

    def feed(self, piece: bytes, read_s: float) -> None:
        """Take what one read brought, wherever it was cut; comments are dropped."""
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
    """The answer is no whole stream of tokens; the text says what came instead."""


# Dialects: what is sent, and what a stream must have said to be whole.


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A whole stream: when its token events came, and the server's counts if it told them."""

    times_s: list[float]
    num_input: int | None
    num_output: int | None


@dataclass(frozen=True, slots=True)
class _Dialect:
    path: str
    body: Callable[[LoadPlan, str, int, int], dict[str, object]]
    read: Callable[[_Stream], _Tokens]


def _tgi_body(plan: LoadPlan, prompt: str, num_tokens: int, seed: int) -> dict[str, object]:
    parameters: dict[str, object] = {"max_new_tokens": num_tokens, "details": True}
    if plan.temperature:
        parameters |= {"do_sample": True, "temperature": plan.temperature, "seed": seed}
    return {"inputs": prompt, "parameters": parameters}


def _completions_body(plan: LoadPlan, prompt: str, num_tokens: int, seed: int) -> dict[str, object]:
    return {"prompt": prompt, **_openai_options(plan, num_tokens, seed)}


def _chat_body(plan: LoadPlan, prompt: str, num_tokens: int, seed: int) -> dict[str, object]:
    messages = [{"role": "user", "content": prompt}]
    return {"messages": messages, **_openai_options(plan, num_tokens, seed)}


def _openai_options(plan: LoadPlan, num_tokens: int, seed: int) -> dict[str, object]:
    return {
        "model": plan.model,
        "max_tokens": num_tokens,
        "temperature": plan.temperature,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _read_tgi(stream: _Stream) -> _Tokens:
    """Every event is a token; the last one carries the whole text and the counts."""
    final = _decoded(stream.last[-1]) if stream.last else {}
    if not isinstance(final.get("generated_text"), str):
        raise _StreamError("no final event")
    details = final.get("details") or {}
    return _Tokens(stream.times_s, details.get("input_length"), details.get("generated_tokens"))


def _read_openai(stream: _Stream) -> _Tokens:
    """Chunks, then [DONE]. The last chunk tells the usage, in some servers without a token."""
    if len(stream.last) < 2 or _data(stream.last[-1]) != b"[DONE]":
        raise _StreamError("no final event")
    start, end = 0, len(stream.times_s) - 1
    last_chunk = _decoded(stream.last[0])
    usage = last_chunk.get("usage") or {}
    if not last_chunk.get("choices"):
        end -= 1
    num_output = usage.get("completion_tokens")
    # Some servers open a chat with a chunk that holds a role and no token; TGI's first
    # token can look the same (half a character), but then the events are as many as told.
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
        raise _StreamError(f"an event that is no JSON object: {_excerpt(event)}")
    return decoded


def _data(event: bytes) -> bytes:
    return event.removeprefix(b"data:").strip()


_DIALECTS = {
    "tgi": _Dialect("/generate_stream", _tgi_body, _read_tgi),
    "completions": _Dialect("/v1/completions", _completions_body, _read_openai),
    "chat": _Dialect("/v1/chat/completions", _chat_body, _read_openai),
}


# The client: connections that stay open, one request at a time on each.

_MAX_IDLE_S = 1.0
"""Older connections are not used again: the server may be closing them (uvicorn: at 5 s)."""


@dataclass(frozen=True, slots=True)
class _Server:
    host: str
    port: int
    authority: str
    prefix: str

    @classmethod
    def parse(cls, url: str) -> "_Server":
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"cannot use {url!r} as a server: write it as http://127.0.0.1:8080")
        return cls(parts.hostname, parts.port or 80, parts.netloc, parts.path.rstrip("/"))


class _Connection(asyncio.Protocol):
    """Owns one socket. Per event it runs `data_received` and `on_body`, and nothing else.

    With 64 streams an event costs 12 to 15 microseconds, of which uvloop with a handler that
    does nothing takes 9 to 11: what is left to save is the kernel's read of the socket.
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
        """Send a request and read its answer into `stream`, up to its end or its failure."""
        assert self._transport is not None
        assert self._ended is None
        self._stream = stream
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(payload)
        await self._ended

    def close(self) -> None:
        self._is_open = False  # now: `connection_lost` comes a turn of the loop later
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, for uvloop's transports are no subclass of asyncio's.
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


class _Client:
    """Owns the connections: as many as there are requests at once, the last used first."""

    def __init__(self, server: _Server, dialect: _Dialect, timeout_s: float) -> None:
        self._server = server
        self._dialect = dialect
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []

    async def open(self, num_connections: int) -> None:
        """Connect ahead, so that a closed loop's first requests do not wait for it."""
        self.close()
        try:
            for _ in range(num_connections):
                self._idle.append(await self._connect())
        except OSError as error:
            raise LoadError(f"cannot reach {self._server.authority}: {error}") from error

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def send(self, request: _Request) -> RequestRecord:
        """Never raises for what the server does: that is what the record's `error` is for."""
        start_s = time.perf_counter()
        stream = _Stream()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(request.payload, stream)
        except TimeoutError:
            stream.broken = f"no whole answer within {self._timeout_s} s"
        except OSError as error:
            stream.broken = f"cannot connect ({error})"
        return _record(request, start_s, stream, self._dialect)

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


def _record(request: _Request, start_s: float, stream: _Stream, dialect: _Dialect) -> RequestRecord:
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


# The loops.


async def _warm_up(client: _Client, requests: list[_Request], concurrency: int) -> None:
    for record in await _closed_loop(client, requests, concurrency):
        if record.error is not None:
            raise LoadError(f"a warm-up request failed: {record.error}")


async def _closed_loop(
    client: _Client, requests: list[_Request], concurrency: int
) -> list[RequestRecord]:
    records: list[RequestRecord] = []
    remaining = iter(requests)

    async def slot() -> None:
        for request in remaining:
            records.append(await client.send(request))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(slot())
    return records


async def _open_loop(
    client: _Client, requests: list[_Request], send_times_s: Iterator[float]
) -> list[RequestRecord]:
    start_s = time.perf_counter()
    tasks = []
    async with asyncio.TaskGroup() as group:
        for request, send_s in zip(requests, send_times_s, strict=True):
            wait_s = start_s + send_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.append(group.create_task(client.send(request)))
    return [task.result() for task in tasks]


# The command line.


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every request of every run succeeded, else 1."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        plan = _plan(options)
        for url in filter(None, (options.url, options.vs)):
            _Server.parse(url)
    except ValueError as error:
        parser.error(str(error))
    try:
        results = uvloop.run(_versus(options, plan) if options.vs else _single(options, plan))
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    return int(any(result.summary.failed for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--url", required=True, help="server, as http://127.0.0.1:8080")
    add("--vs", "--url2", help="a second server, measured in turns with the first")
    add("--rounds", type=int, default=5, help="turns of each server, with --vs")
    add("--api", choices=tuple(_DIALECTS), default="tgi", help="the wire to speak")
    arrival = parser.add_mutually_exclusive_group(required=True)
    arrival.add_argument("--concurrency", type=int, help="closed loop: requests at once")
    arrival.add_argument("--rate", type=float, help="open loop: Poisson arrivals per second")
    add("--num-requests", type=int, default=100, help="requests measured")
    add("--input-len", default="128", help="128, 64:256 or 0.7*32:64+0.3*512")
    add("--output-len", default="128", help="likewise; a model may stop before it")
    add("--shared-prefix-len", type=int, default=0, help="words before each prompt")
    add("--shared-fraction", type=float, default=1.0, help="requests whose prefix is the same")
    add("--seed", type=int, default=0, help="of every choice; a new one for prompts not seen yet")
    add("--warmup", type=int, default=0, help="requests before the clock starts")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--model", default="tgi", help="OpenAI's `model`; tgi is whatever is served")
    add("--timeout-s", type=float, default=600.0, help="for one request")
    add("--json", type=Path, help="write configuration, figures and raw times to this file")
    return parser


def _plan(options: argparse.Namespace) -> LoadPlan:
    if options.rounds < 1:
        raise ValueError("rounds must be 1 or more")
    values = {field.name: getattr(options, field.name) for field in fields(LoadPlan)}
    lengths = {name: LengthMix.parse(values[name]) for name in ("input_len", "output_len")}
    return LoadPlan(**values | lengths)


async def _single(options: argparse.Namespace, plan: LoadPlan) -> list[LoadResult]:
    result = await run_load(options.url, plan)
    print(summary_table(result.summary))
    _write_json(options.json, result_json(result))
    return [result]


async def _versus(options: argparse.Namespace, plan: LoadPlan) -> list[LoadResult]:
    pairs = []
    async for pair in run_versus(options.url, options.vs, plan, options.rounds):
        pairs.append(pair)
        print(f"round {len(pairs)} of {options.rounds} done", file=sys.stderr)
    rounds = [(a.summary, b.summary) for a, b in pairs]
    print(versus_table(options.url, options.vs, rounds))
    _write_json(
        options.json,
        {
            "rounds": [{"a": result_json(a), "b": result_json(b)} for a, b in pairs],
            "ratios": {name: asdict(ratio) for name, ratio in ratios(rounds).items()},
        },
    )
    return [result for pair in pairs for result in pair]


def result_json(result: LoadResult) -> dict[str, object]:
    """Configuration, figures and raw times, ready for a JSON writer."""
    lengths = {"input_len": result.plan.input_len.text, "output_len": result.plan.output_len.text}
    return {
        "url": result.url,
        "config": asdict(result.plan) | lengths,
        **summary_json(result.summary),
        **records_json(result.records),
    }


def _write_json(path: Path | None, content: dict[str, object]) -> None:
    if path is not None:
        path.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))


if __name__ == "__main__":
    sys.exit(main())
