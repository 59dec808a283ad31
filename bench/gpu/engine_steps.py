"""Time the whole engine, with its scheduler, steps, text and events, by calling `Engine.step`.

In contrast, `bench.gpu.steps.Steps` times what the device does.
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
"""Steps before the timed ones. The first captures its graph, the second replays it."""
_NUM_REPEATS = 7


@dataclass(frozen=True, slots=True)
class Steady:
    """Decode steps of a batch that does not change.

    wall     seconds from one step to the next
    context  mean number of tokens of a sequence, over all sequences and steps
    """

    wall: float
    tokens_per_s: float
    context: float


def steady_decode(engine: Engine, batch: int, context: int, count: int, vocab_size: int) -> Steady:
    """Time `count` decode steps with `batch` sequences of about `context` tokens.

    Prompts take several steps, in which sequences with a finished prompt already decode. So
    prompts are shorter than `context`, by the mean number of tokens gained until then.
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
    """Step until every sequence has a few tokens, and return how many there are in all."""
    counts: dict[str, int] = {}
    while len(counts) < batch or min(counts.values()) < _NUM_WARM:
        if not engine.has_work:
            raise RuntimeError("the sequences ended before all of them ran together")
        for request_id in _tokens_of(engine.step()):
            counts[request_id] = counts.get(request_id, 0) + 1
    return sum(counts.values())


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Seconds until the first token, and host seconds until its step was launched."""

    seconds: float
    host: float


@dataclass(frozen=True, slots=True)
class CachedPrompt:
    """The first token of a new prompt, and the median when it is cached.

    num_found  tokens of the prompt that were found in the cache
    """

    cold: FirstToken
    cached: FirstToken
    num_found: int


def cached_prompt(engine: Engine, length: int, vocab_size: int) -> CachedPrompt:
    """Time a prompt of `length` tokens, first new and then cached.

    Raises RuntimeError if most of it was not found in the cache.
    """
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
    """Time the first token of a request to an idle engine, then let the request end."""
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
    """Return the request id of each token. Raises RuntimeError if a request failed."""
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
