"""Measures how long a long prompt holds up the sequences that decode beside it.

    python -m bench.long_prompt --tokens 4000

Four sequences of the built-in model decode while the prompt is computed: once in chunks as large
as the engine's token budget, once as `PrefillBudget` limits them. Both take turns in one process,
since the speed of a shared machine changes from minute to minute.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from engine.core.config import DEFAULT_MODEL_ID, EngineConfig, LoadConfig
from engine.core.prefill_budget import PrefillBudget
from engine.core.request import Request, SamplingParams, StoppingParams
from engine.engine import Engine

_NUM_STREAMS = 4
_NUM_ALONE = 8
"""Steps of decodes alone before and after the prompt."""


@dataclass(frozen=True, slots=True)
class Gaps:
    """Seconds between the steps: of decodes alone, and beside the prompt."""

    alone: list[float]
    beside: list[float]

    def slowdown(self, share: float = 0.5) -> float:
        """Return the gap beside the prompt that is longer than `share` of them, as a multiple of
        the median gap of decodes alone.
        """
        ordered = sorted(self.beside)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] / median(self.alone)


def measure(engine: Engine, num_tokens: int, limited: bool = True) -> Gaps:
    """Compute a prompt of `num_tokens` random tokens beside four sequences that decode."""
    streams = [_request(f"stream {i}", 8, 100_000) for i in range(_NUM_STREAMS)]
    for stream in streams:
        engine.add(stream)
    with nullcontext() if limited else _unlimited(engine):
        list(_steps(engine, _countdown(_NUM_ALONE)))
        steps = list(_steps(engine, _countdown(_NUM_ALONE)))
        engine.add(_request("prompt", num_tokens, 1))
        steps += _steps(engine, lambda: engine.figures().num_running > _NUM_STREAMS)
        steps += _steps(engine, _countdown(_NUM_ALONE))
    for stream in streams:
        engine.abort(stream.request_id)
    list(_steps(engine, lambda: engine.has_work))
    return Gaps(
        alone=[seconds for tokens, seconds in steps if tokens <= _NUM_STREAMS],
        beside=[seconds for tokens, seconds in steps if tokens > _NUM_STREAMS],
    )


def _request(name: str, num_tokens: int, num_new: int) -> Request:
    ids = [random.Random(name).randrange(1000, 40_000) for _ in range(num_tokens)]
    stopping = StoppingParams(num_new, ignore_eos=True)
    return Request(name, ids, SamplingParams(), stopping)


def _steps(engine: Engine, more: Callable[[], bool]) -> Iterator[tuple[int, float]]:
    """Yield the tokens of each step and the seconds since the one before it."""
    last = perf_counter()
    engine.step()
    while more():
        engine.step()
        now = perf_counter()
        if engine.last_step is not None:
            yield engine.last_step.num_tokens, now - last
        last = now


def _countdown(count: int) -> Callable[[], bool]:
    left = iter(range(count))
    return lambda: next(left, None) is not None


@contextmanager
def _unlimited(engine: Engine) -> Iterator[None]:
    """Give prompts the whole budget, by a least number of tokens that is all of them."""
    pipeline, num_tokens = engine.pipeline, engine.limits.max_batch_tokens
    own, pipeline.prefill_budget = pipeline.prefill_budget, PrefillBudget(num_tokens, num_tokens)
    try:
        yield
    finally:
        pipeline.prefill_budget = own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    config = EngineConfig(max_total_tokens=asked.tokens + 1024, prefix_caching=False)
    engine = Engine.load(LoadConfig(DEFAULT_MODEL_ID), config)
    for _ in range(asked.rounds):
        for limited in (False, True):
            gaps = measure(engine, asked.tokens, limited)
            print(
                f"{'limited' if limited else 'whole budget':12}  "
                f"alone {median(gaps.alone) * 1e3:4.0f} ms, beside {len(gaps.beside):3} steps: "
                f"median {gaps.slowdown():5.2f}x, p99 {gaps.slowdown(0.99):5.2f}x, "
                f"in all {sum(gaps.beside):.1f} s",
                flush=True,
            )
    engine.close()


if __name__ == "__main__":
    main()
