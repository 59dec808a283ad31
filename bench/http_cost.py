"""Measure what the HTTP side costs per token: the real server around an engine that only ticks.

    python -m bench.http_cost --streams 256 --rate 100

The engine is a source that gives every stream a token at each step. It models a device that takes
1 / rate seconds for a step, and a host that launches the next step meanwhile: Python work between
calls that let go of the interpreter lock, as calls of torch do. Where the event loop keeps the lock
for too long, the device has to wait for the launch, and the steps become slower.
"""

import argparse
import asyncio
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
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

    def chat_mentions(self, text: str) -> bool:
        del text
        return False

    def render_chat(self, messages: object, tools: object = None) -> str:
        del messages, tools
        return "x"


class PacedSource:
    """Stands for an `Engine` under `AsyncEngine`, with a model of its device and its host.

    rate               steps per second of the device
    python_s           seconds of Python that a step takes on the host
    num_releases       how often a step lets go of the interpreter lock meanwhile
    """

    def __init__(self, rate: float, python_s: float = 1.3e-3, num_releases: int = 20):
        self._step_s = 1 / rate
        self._num_releases = num_releases
        self._loops = int(python_s / num_releases * _loops_per_second())
        self._device_done = 0.0
        self._in_flight: list[tuple[str, Event]] | None = None
        self._live: dict[str, int] = {}
        self._asked: dict[str, int] = {}
        self.tokenizer = _Tokenizer()
        self.grammars = None
        self.last_step = None
        self.limits = SimpleNamespace(max_total_tokens=1 << 20)
        self.info = ModelInfo("source", None, None, "none", "cpu", 32_000, 0, None)
        self.cold_start = ColdStart()
        self.num_steps = 0
        self.device_idle_s = 0.0
        self.cpu_s = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._in_flight)

    def add(self, request: Request, forks: Sequence[Request] = ()) -> None:
        for each in (request, *forks):
            self._live[each.request_id] = self._asked[each.request_id] = (
                each.stopping.max_new_tokens
            )

    def abort(self, request_id: str) -> None:
        self._live.pop(request_id, None)

    def step(self, launched: Callable[[], None]) -> list[tuple[str, Event]]:
        """Launch a step, wait for the one before it, and return the events of that one."""
        started = time.thread_time()
        self._compute()
        now, before = time.perf_counter(), self._device_done
        if self._in_flight is not None:
            self.device_idle_s += max(now - before, 0.0)
        self._device_done = max(now, before) + self._step_s
        events, self._in_flight = self._in_flight or [], self._draw() or None
        launched()
        time.sleep(max(before - time.perf_counter(), 0.0))
        self._compute()
        self.num_steps += 1
        self.cpu_s += time.thread_time() - started
        return events

    def _compute(self) -> None:
        """Do half of a step's work on the host."""
        for _ in range(self._num_releases // 2):
            for _ in range(self._loops):
                pass
            time.sleep(0)  # lets go of the interpreter lock and asks for it again

    def _draw(self) -> list[tuple[str, Event]]:
        events: list[tuple[str, Event]] = []
        for request_id, remaining in list(self._live.items()):
            events.append((request_id, _TOKEN))
            if remaining == 1:
                del self._live[request_id]
                events.append((request_id, _finished(self._asked.pop(request_id))))
            else:
                self._live[request_id] = remaining - 1
        return events

    def figures(self) -> EngineFigures:
        return EngineFigures(num_running=len(self._live))

    def capture_next_graph(self) -> bool:
        return False

    def fail_all(self, message: str) -> list[tuple[str, Event]]:
        del message
        self._live.clear()
        return []

    def close(self) -> None:
        pass


def _loops_per_second() -> float:
    """Return how many empty loops Python makes in a second, alone."""
    count = 200_000
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(count):
            pass
        best = min(best, time.perf_counter() - started)
    return count / best


def _finished(count: int) -> Finished:
    return Finished(FinishReason.LENGTH, " token" * count, 3, count, None, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Cost:
    """What serving the streams took.

    cpu_s     CPU time of the server, without the engine's steps
    slowdown  time of a step, compared with that of the device alone
    """

    streams: int
    rate: float
    tokens: int
    seconds: float
    cpu_s: float
    slowdown: float = 1.0

    @property
    def us_per_token(self) -> float:
        return self.cpu_s / self.tokens * 1e6

    def __str__(self) -> str:
        return (
            f"{self.streams:4} streams at {self.rate:.0f}/s: "
            f"a step takes {self.slowdown:.3f} times as long as on the device, "
            f"{self.us_per_token:.1f} us of CPU per token, "
            f"{self.tokens / self.seconds:.0f} tokens/s"
        )


def measure(api: str, streams: int, rate: float, seconds: float) -> Cost:
    source = PacedSource(rate)
    serving = serving_engine(source, streams)  # type: ignore[arg-type]
    cost = _measure(serving, api, streams, rate, int(seconds * rate))
    slowdown = 1 + source.device_idle_s * rate / source.num_steps
    return replace(cost, cpu_s=cost.cpu_s - source.cpu_s, slowdown=slowdown)


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
    return Cost(streams, rate, streams * num_tokens, elapsed, cpu_s)


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
