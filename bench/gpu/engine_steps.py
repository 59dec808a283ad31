"""The whole engine, driven by hand: scheduler, steps, text and events.

`Steps` times what the device does; here the clock runs around `Engine.step`.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine.core.request import (
    Failed,
    Request,
    SamplingParams,
    StoppingParams,
    TokenOutput,
)
from engine.engine import Engine, Events

_NUM_WARM = 8
"""Steps before any is timed: the first captures its graph, the second replays it."""
_NUM_REPEATS = 7


@dataclass(frozen=True, slots=True)
class Steady:
    """Decode steps of a batch that stays as it is.

    wall     seconds from one step to the next
    context  tokens of a sequence, the mean over all of them and over the steps
    """

    wall: float
    tokens_per_s: float
    context: float


def steady_decode(engine: Engine, batch: int, context: int, count: int, vocab_size: int) -> Steady:
    """Of `count` steps with `batch` sequences of about `context` tokens.

    Prompts are computed a step's tokens at a time, and those that are done decode meanwhile: they
    are shorter by what the mean of them gains until then.
    """
    num_filling = batch * context // engine.limits.max_batch_tokens
    length = max(context - num_filling // 2 - _NUM_WARM - count // 2, 1)
    num_new = engine.limits.max_total_tokens - length
    rng = random.Random(f"{batch} x {context}")
    for index in range(batch):
        prompt = _prompt(rng, length, vocab_size)
        engine.add(_request(f"steady-{batch}-{index}", prompt, num_new))
    try:
        num_known = _until_all_decode(engine, batch)
        started, num_tokens = time.perf_counter(), 0
        for _ in range(count):
            num_tokens += len(_tokens_of(engine.step()))
        seconds = time.perf_counter() - started
    finally:
        engine.fail_all("measured")
        _drain(engine)
    if num_tokens != batch * count:
        raise RuntimeError(f"{num_tokens} tokens of {count} steps of {batch}: no steady decode")
    mean = length + (num_known + num_tokens / 2) / batch
    return Steady(seconds / count, num_tokens / seconds, mean)


def _until_all_decode(engine: Engine, batch: int) -> int:
    """Step until every sequence has had a few tokens; how many there were."""
    counts: dict[str, int] = {}
    while len(counts) < batch or min(counts.values()) < _NUM_WARM:
        if not engine.has_work:
            raise RuntimeError("the sequences ended before all of them ran together")
        for request_id in _tokens_of(engine.step()):
            counts[request_id] = counts.get(request_id, 0) + 1
    return sum(counts.values())


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Seconds until it was there, and of the host's until its step was launched."""

    seconds: float
    host: float


@dataclass(frozen=True, slots=True)
class CachedPrompt:
    """A prompt that was never seen, and the median of the same again; how much was found."""

    cold: FirstToken
    cached: FirstToken
    num_found: int


def cached_prompt(engine: Engine, length: int, vocab_size: int) -> CachedPrompt:
    """Raises RuntimeError where most of it was not found again."""
    prompt = _prompt(random.Random("cached prompt"), length, vocab_size)
    cold = _first_token(engine, "cold", prompt)
    before = engine.figures().num_prefix_hit_tokens
    again = [_first_token(engine, f"cached-{i}", prompt) for i in range(_NUM_REPEATS)]
    num_found = (engine.figures().num_prefix_hit_tokens - before) // _NUM_REPEATS
    if num_found < length // 2:
        raise RuntimeError(f"of {length} tokens {num_found} were found in the cache")
    cached = FirstToken(
        statistics.median(first.seconds for first in again),
        statistics.median(first.host for first in again),
    )
    return CachedPrompt(cold, cached, num_found)


def _first_token(engine: Engine, request_id: str, prompt: list[int]) -> FirstToken:
    """Of an idle engine, which then goes on with the second."""
    started = time.perf_counter()
    engine.add(_request(request_id, prompt, 4))
    events = engine.step()
    launched = time.perf_counter()
    while not _tokens_of(events):
        events = engine.step()
    seconds = time.perf_counter() - started
    _drain(engine)
    return FirstToken(seconds, launched - started)


def _tokens_of(events: Events) -> Sequence[str]:
    """The request of each token. Raises RuntimeError where one failed."""
    for request_id, event in events:
        if isinstance(event, Failed):
            raise RuntimeError(f"{request_id} failed: {event.message}")
    return [request_id for request_id, event in events if isinstance(event, TokenOutput)]


def _drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def _prompt(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(length)]


def _request(request_id: str, prompt: list[int], num_new: int) -> Request:
    stopping = StoppingParams(num_new, ignore_eos=True)
    return Request(request_id, prompt, SamplingParams(), stopping)
