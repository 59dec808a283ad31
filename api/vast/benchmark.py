"""The benchmark at start: tokens per second of this worker, with which the autoscaler plans.

It has the shape of the benchmark in Vast's stock worker: eight runs of up to fifty concurrent
requests, each with a prompt of random words. The result is the highest tokens per second of any
run. There are two differences: only tokens that were generated are counted, and the time is
limited, so the first run has a single request.
"""

import asyncio
import hashlib
import json
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from api.generation.state import AppState
from engine.async_engine import AsyncEngine
from engine.core.request import (
    Delivery,
    Failed,
    Request,
    SamplingParams,
    StoppingParams,
)

_RUNS = 8
_MAX_CONCURRENCY = 50
_NUM_WORDS = 250
_NUM_TOKENS = 128
_TEMPERATURE = 0.7
_COMMON_WORDS = (
    "a about after all also and as at back be because but by can come could day even find first "
    "for from get give good have he her here him his how if in into it its just know like look "
    "make man many me more my new no not now of on one only or other our out people say see she "
    "so some take tell than that the their them then there these they thing think this time to "
    "two up use very want way we well what when which who will with work would year you"
)

logger = logging.getLogger(__name__)


class BenchmarkFailed(Exception):
    """The benchmark generated no token, or a generation failed."""


@dataclass(frozen=True, slots=True)
class BenchmarkKey:
    """Identifies what was measured. A result is reused only where all of it is the same."""

    model: str
    device: str
    version: str
    settings: str

    @property
    def file_name(self) -> str:
        text = json.dumps([self.model, self.device, self.version, self.settings])
        return f"benchmark-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def benchmark_key(state: AppState) -> BenchmarkKey:
    settings, model = state.settings, state.engine.model
    return BenchmarkKey(
        model=f"{model.sha} {model.weight_bytes} {settings.load_config()}",
        device=model.device,
        version=source_digest(Path(__file__).parents[2]),
        settings=f"{settings.engine_config()} {settings.max_concurrent_requests}",
    )


def source_digest(root: Path) -> str:
    """Return a digest of the source code that runs a step: an exact version of it."""
    digest = hashlib.sha256()
    for path in sorted((*root.glob("engine/**/*.py"), *root.glob("kernels/**/*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


async def max_perf(engine: AsyncEngine, key: BenchmarkKey, cache: Path, seconds: float) -> float:
    """Return tokens per second, from the cache if the same worker was measured before. Raises
    BenchmarkFailed.
    """
    path = cache / key.file_name
    known = await asyncio.to_thread(_read, path)
    if known is not None:
        logger.info("benchmark: %.1f tokens/s, measured at an earlier start", known)
        return known
    measured = await measure(engine, seconds)
    await asyncio.to_thread(_write, path, measured)
    return measured


async def measure(engine: AsyncEngine, seconds: float) -> float:
    """Return the tokens per second of the best run. Each run has twice as many concurrent requests
    as the one before and takes at most twice as long; no run starts that might not end in time.
    """
    deadline = time.monotonic() + seconds
    best, took = 0.0, 0.0
    for run in range(_RUNS):
        started = time.monotonic()
        if started + took * 2 > deadline:
            break
        concurrency = min(2**run, _MAX_CONCURRENCY, engine.free_permits)
        best = max(best, await _run(engine, run, concurrency, deadline - started))
        took = time.monotonic() - started
    if best == 0.0:
        raise BenchmarkFailed("no token came in time")
    return best


async def _run(engine: AsyncEngine, run: int, concurrency: int, seconds: float) -> float:
    """Return the tokens per second of one run. It is cut off after `seconds`; the tokens generated
    until then count.
    """
    requests = [_request(engine, f"benchmark-{run}-{n}") for n in range(concurrency)]
    counts = [0] * concurrency
    started = time.perf_counter()
    with ExitStack() as running:
        running.enter_context(engine.admit(concurrency))
        generations = [running.enter_context(engine.submit(request)) for request in requests]
        readers = (_count(g.deliveries(), counts, n) for n, g in enumerate(generations))
        try:
            async with asyncio.timeout(seconds):
                await asyncio.gather(*readers)
        except TimeoutError:
            pass
        elapsed = time.perf_counter() - started
    logger.info(
        "benchmark: %d tokens in %.2f s, %d requests at once", sum(counts), elapsed, concurrency
    )
    return sum(counts) / elapsed


async def _count(deliveries: AsyncIterator[Delivery], counts: list[int], n: int) -> None:
    async for tokens, end in deliveries:
        if isinstance(end, Failed):
            raise BenchmarkFailed(end.message)
        counts[n] += len(tokens)


def _request(engine: AsyncEngine, request_id: str) -> Request:
    """Return a request with a prompt of random words, so that no prompt shares a cached prefix."""
    ids = engine.tokenizer.encode(" ".join(random.choices(_COMMON_WORDS.split(), k=_NUM_WORDS)))
    num_tokens = min(_NUM_TOKENS, engine.max_total_tokens // 2)
    return Request(
        request_id=request_id,
        prompt_ids=ids[: engine.max_total_tokens - num_tokens],
        sampling=SamplingParams(do_sample=True, temperature=_TEMPERATURE),
        stopping=StoppingParams(num_tokens, ignore_eos=True),
    )


def _read(path: Path) -> float | None:
    try:
        value = json.loads(path.read_text())["tokens_per_second"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _write(path: Path, value: float) -> None:
    """Write the result atomically. If it cannot be written, the next start measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps({"tokens_per_second": value}))
        whole.replace(path)
    except OSError as error:
        logger.warning("the benchmark's result cannot be written to %s: %s", path.parent, error)
