"""Measure how a flood of forged requests slows down a worker's honest requests.

    python -m bench.vast_flood --rate 1000 --seconds 10

The real worker, with signatures, runs around an engine that only ticks (`bench.http_cost`), so
that only the HTTP side is measured. Honest clients, each in a closed loop, are measured without
the flood and then in it. Both kinds of clients run in their own processes. Forged envelopes are
tampered with, signed by a stranger, or not signed at all.
"""

import argparse
import asyncio
import base64
import json
import multiprocessing
import socket
import statistics
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import uvloop
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import SecretStr

from api.generation.state import AppState, build_state
from api.settings.config import read_settings
from api.settings.vast_variables import Identity, WorkerConfig
from api.vast.worker import Worker
from bench.http_cost import PacedSource
from engine.async_engine import AsyncEngine

_NUM_CLIENTS = 16
_NUM_TOKENS = 20
_STEPS_PER_S = 100.0
_WARM_S = 1.0


@dataclass(frozen=True, slots=True)
class Honest:
    """What honest clients measured; `latencies` are in seconds."""

    latencies: list[float]
    statuses: Counter[int]

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.latencies, n=100)[98]


class Envelopes:
    """Makes honest envelopes, signed by this measurement's autoscaler, and forged ones."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    @property
    def public_key(self) -> bytes:
        return self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def honest(self) -> bytes:
        return self._envelope(self._url, self._signature(self._key))

    def forged(self) -> list[bytes]:
        return [
            self._envelope("http://elsewhere", self._signature(self._key)),
            self._envelope(self._url, self._signature(self._stranger)),
            self._envelope(self._url, "AAAA"),
        ]

    def _signature(self, key: rsa.RSAPrivateKey) -> str:
        message = json.dumps({"url": self._url}, indent=4).encode()
        return base64.b64encode(key.sign(message, padding.PKCS1v15(), hashes.SHA256())).decode()

    def _envelope(self, url: str, signature: str) -> bytes:
        auth = {"signature": signature, "cost": _NUM_TOKENS, "endpoint": "e", "reqnum": 1}
        payload = {"inputs": "x", "parameters": {"max_new_tokens": _NUM_TOKENS}}
        body = {"auth_data": {**auth, "request_idx": 1, "url": url}, "payload": payload}
        return json.dumps(body).encode()


def ask_honestly(port: int, body: bytes, seconds: float) -> Honest:
    async def client(latencies: list[float], statuses: Counter[int]) -> None:
        connection = await _Connection.open(port)
        warm = time.monotonic() + _WARM_S
        while time.monotonic() < warm:
            await connection.post(body)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            started = time.perf_counter()
            statuses[await connection.post(body)] += 1
            latencies.append(time.perf_counter() - started)

    async def clients() -> Honest:
        honest = Honest([], Counter())
        await asyncio.gather(
            *(client(honest.latencies, honest.statuses) for _ in range(_NUM_CLIENTS))
        )
        return honest

    return uvloop.run(clients())


def flood(port: int, bodies: list[bytes], rate: float, seconds: float) -> Counter[int]:
    """Post the bodies in an open loop, with one connection per outstanding response.

    Returns how many responses had each status.
    """

    async def run() -> Counter[int]:
        statuses: Counter[int] = Counter()
        idle: list[_Connection] = []

        async def post(body: bytes) -> None:
            connection = idle.pop() if idle else await _Connection.open(port)
            statuses[await connection.post(body)] += 1
            idle.append(connection)

        started, posts = time.monotonic(), []
        for n in range(int(rate * seconds)):
            await asyncio.sleep(max(started + n / rate - time.monotonic(), 0))
            posts.append(asyncio.create_task(post(bodies[n % len(bodies)])))
        await asyncio.gather(*posts)
        return statuses

    return uvloop.run(run())


@dataclass(frozen=True, slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, port: int) -> "_Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def post(self, body: bytes) -> int:
        """Post the body, and return the status of the response."""
        head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        answer = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = answer.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await self.reader.readexactly(int(length))
        return int(answer.split(b" ", 2)[1])


async def measure(rate: float, seconds: float) -> tuple[Honest, Honest, Counter[int]]:
    """Return the honest figures without and with the flood, and the statuses of the flood."""
    with socket.socket() as probe, TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        config = _config(probe.getsockname()[1], Path(folder))
        probe.close()
        envelopes, loaded = Envelopes(config.identity.url), asyncio.Event()

        def platform(request: httpx2.Request) -> httpx2.Response:
            if request.url.path == "/worker_status/" and json.loads(request.content)["loadtime"]:
                loaded.set()
            return httpx2.Response(200, content=envelopes.public_key)

        async with httpx2.AsyncClient(transport=httpx2.MockTransport(platform)) as http:
            living = asyncio.create_task(Worker(config, _load, http).run())
            await loaded.wait()
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(2, spawn) as pool:
                run: Any = asyncio.get_running_loop().run_in_executor
                honest = (config.port, envelopes.honest(), seconds)
                # Start both processes before anything is measured.
                await asyncio.gather(*(run(pool, time.sleep, 3.0) for _ in range(2)))
                alone = await run(pool, ask_honestly, *honest)
                flooding = run(
                    pool, flood, config.port, envelopes.forged(), rate, seconds + 2 * _WARM_S
                )
                flooded = await run(pool, ask_honestly, *honest)
                answers = await flooding
            living.cancel()
            await asyncio.gather(living, return_exceptions=True)
    return alone, flooded, answers


def _load() -> AppState:
    source: Any = PacedSource(_STEPS_PER_S)
    return build_state(AsyncEngine(source, 256), read_settings(["--log-level", "error"]))


def _config(port: int, folder: Path) -> WorkerConfig:
    return WorkerConfig(
        identity=Identity(1, SecretStr(""), ("http://a",), f"http://127.0.0.1:{port}"),
        port=port,
        use_ssl=False,
        unsecured=False,
        max_queue_time_s=None,
        max_sessions=0,
        console_url="",
        tls_directory=folder,
        benchmark_cache=folder,
        benchmark_seconds=2.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=1000.0, help="forged requests per second")
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    alone, flooded, answers = uvloop.run(measure(options.rate, options.seconds))
    print(f"alone:   p99 {alone.p99 * 1e3:.1f} ms, {len(alone.latencies)} requests")
    print(f"flooded: p99 {flooded.p99 * 1e3:.1f} ms, {len(flooded.latencies)} requests")
    print(f"ratio {flooded.p99 / alone.p99:.3f}; honest ones answered {dict(flooded.statuses)}")
    print(f"the flood of {options.rate:.0f}/s was answered {dict(answers)}")


if __name__ == "__main__":
    main()
