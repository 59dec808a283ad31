"""Measure what the HTTP side costs per token: the real server around an engine that only ticks.

    python -m bench.http_cost --streams 256 --rate 100

The engine is a fixed source that gives every stream a token each 1 / rate seconds, as a GPU
would.
"""

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from types import SimpleNamespace
from urllib.parse import urlsplit

import orjson
import uvloop

from bench.bare_server import serving_bare
from bench.http_engine import serving_engine
from engine.core.metrics import ColdStart, EngineFigures, ModelInfo
from engine.core.request import (
    Event,
    Finished,
    FinishReason,
    Request,
    Token,
    TokenOutput,
)

_PATHS = {
    "tgi": ("/generate_stream", lambda n: {"inputs": "x", "parameters": {"max_new_tokens": n}}),
    "chat": (
        "/v1/chat/completions",
        lambda n: {
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": n,
            "stream": True,
        },
    ),
}
_TOKEN = TokenOutput(Token(1234, " token", -1.2345678, False))


class _Tokenizer:
    def encode(
        self, text: str, truncate: int | None = None, add_special_tokens: bool = True
    ) -> list[int]:
        del text, truncate, add_special_tokens
        return [1, 2, 3]

    def render_chat(self, messages: object, tools: object = None) -> str:
        del messages, tools
        return "x"


class FixedSource:
    """Stands for an `Engine` under `AsyncEngine`: gives every request a token at each tick."""

    def __init__(self, rate: float):
        self._interval_s = 1 / rate
        self._next = 0.0
        self._live: dict[str, int] = {}
        self._asked: dict[str, int] = {}
        self.tokenizer = _Tokenizer()
        self.grammars = None
        self.last_step = None
        self.limits = SimpleNamespace(max_total_tokens=1 << 20)
        self.info = ModelInfo("source", None, None, "none", "cpu", 0, 0, None)
        self.cold_start = ColdStart()
        self.num_late_ticks = 0
        self.num_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def add(self, request: Request, forks: Sequence[Request] = ()) -> None:
        for each in (request, *forks):
            self._live[each.request_id] = self._asked[each.request_id] = (
                each.stopping.max_new_tokens
            )

    def abort(self, request_id: str) -> None:
        self._live.pop(request_id, None)

    def step(self) -> list[tuple[str, Event]]:
        wait = self._next - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        elif wait < -self._interval_s:
            self.num_late_ticks += 1
            self._next = time.perf_counter()
        self._next += self._interval_s
        events: list[tuple[str, Event]] = []
        for request_id, remaining in list(self._live.items()):
            events.append((request_id, _TOKEN))
            if remaining == 1:
                del self._live[request_id]
                events.append((request_id, _finished(self._asked.pop(request_id))))
            else:
                self._live[request_id] = remaining - 1
        self.num_tokens += len(events)
        return events

    def figures(self) -> EngineFigures:
        return EngineFigures(num_running=len(self._live))

    def prepare(self) -> bool:
        return False

    def fail_all(self, message: str) -> list[tuple[str, Event]]:
        del message
        self._live.clear()
        return []

    def close(self) -> None:
        pass


def _finished(count: int) -> Finished:
    return Finished(FinishReason.LENGTH, " token" * count, 3, count, None, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Cost:
    streams: int
    rate: float
    tokens: int
    seconds: float
    cpu_s: float
    ideal_s: float
    num_late_ticks: int = 0

    @property
    def us_per_token(self) -> float:
        return self.cpu_s / self.tokens * 1e6

    def __str__(self) -> str:
        return (
            f"{self.streams:4} streams at {self.rate:.0f}/s: "
            f"{self.ideal_s / self.seconds:.3f} of the source's rate, "
            f"{self.us_per_token:.1f} us of CPU per token, "
            f"{self.tokens / self.seconds:.0f} tokens/s, {self.num_late_ticks} ticks late"
        )


def measure(api: str, streams: int, rate: float, seconds: float) -> Cost:
    source = FixedSource(rate)
    serving = serving_engine(source, streams)  # type: ignore[arg-type]
    cost = _measure(serving, api, streams, rate, int(seconds * rate))
    return replace(cost, num_late_ticks=source.num_late_ticks)


def measure_bare(streams: int, rate: float, seconds: float) -> Cost:
    num_tokens = int(seconds * rate)
    return _measure(serving_bare(rate, num_tokens), "tgi", streams, rate, num_tokens)


def _measure(
    serving: AbstractContextManager[str], api: str, streams: int, rate: float, num_tokens: int
) -> Cost:
    with serving as url:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        clients = multiprocessing.get_context("spawn").Process(
            target=_run_clients, args=(theirs, url, api, streams, num_tokens)
        )
        clients.start()
        assert ours.recv() == "ready"
        cpu_s, started = time.process_time(), time.perf_counter()
        ours.send("go")
        received = ours.recv()
        cpu_s, elapsed = time.process_time() - cpu_s, time.perf_counter() - started
        clients.join()
    assert received >= streams * num_tokens, f"{received} events of {streams * num_tokens}"
    return Cost(streams, rate, streams * num_tokens, elapsed, cpu_s, num_tokens / rate)


def _run_clients(pipe: Connection, url: str, api: str, streams: int, num_tokens: int) -> None:
    uvloop.run(_clients(pipe, url, api, streams, num_tokens))


async def _clients(pipe: Connection, url: str, api: str, streams: int, num_tokens: int) -> None:
    address = urlsplit(url)
    path, body = _PATHS[api]
    content = orjson.dumps(body(num_tokens))
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
    )
    connections = [
        await asyncio.open_connection(address.hostname, address.port) for _ in range(streams)
    ]
    pipe.send("ready")
    pipe.recv()

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        writer.write(head.encode() + content)
        num_events = 0
        while piece := await reader.read(1 << 16):
            num_events += piece.count(b"data: {")
        writer.close()
        return num_events

    counts = await asyncio.gather(*(read(*connection) for connection in connections))
    pipe.send(sum(counts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--api", choices=sorted(_PATHS), default="tgi")
    parser.add_argument("--streams", default="1,32,256", help="comma-separated")
    parser.add_argument("--rate", type=float, default=100.0, help="steps per second")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each run")
    options = parser.parse_args()
    for streams in map(int, options.streams.split(",")):
        bare = measure_bare(streams, options.rate, options.seconds)
        cost = measure(options.api, streams, options.rate, options.seconds)
        print(
            f"{cost}; a bare application {bare.us_per_token:.1f} us: "
            f"{cost.us_per_token / bare.us_per_token:.2f} times that",
            flush=True,
        )


if __name__ == "__main__":
    main()
