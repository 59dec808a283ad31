"""Measure the engine's own cost per step, with the forward of the model stubbed out.

    python -m bench.overhead

What remains is scheduling, building inputs, examining tokens, decoding text and emitting
events. On a GPU this must take less time than a step of the device, so it limits how fast a
fast model can be served. The aim is 150 microseconds for 1 sequence and 600 for 256.
"""

import argparse
import statistics
import time

import numpy as np

from engine.core.config import DEFAULT_MODEL_ID, EngineConfig, LoadConfig
from engine.core.request import Request, SamplingParams, StoppingParams
from engine.engine import Engine
from engine.loading.loader import load
from engine.step.builder import HostStep
from engine.step.result import HostTokens, StepResult

_TOKEN = 260  # an ordinary word piece of the default model


class _Done:
    """A step whose result is available as soon as it is launched."""

    def __init__(self, num_sampled: int):
        tokens = HostTokens(np.full(num_sampled, _TOKEN), np.zeros(num_sampled, np.float32))
        self._result = StepResult(tokens, None)

    def result(self) -> StepResult:
        return self._result

    def exception(self) -> None:
        pass


def _launch(step: HostStep) -> _Done:
    return _Done(step.num_sampled)


def microseconds_per_step(engine: Engine, num_sequences: int, num_steps: int) -> float:
    """Return the median over the decode steps in which every sequence runs."""
    for i in range(num_sequences):
        engine.add(
            Request(
                request_id=f"{num_sequences}-{i}",
                prompt_ids=[_TOKEN] * 32,
                sampling=SamplingParams(logprobs=True),
                stopping=StoppingParams(num_steps, ignore_eos=True),
            )
        )
    seconds = []
    while engine.has_work:
        started = time.perf_counter()
        events = engine.step()
        elapsed = time.perf_counter() - started
        if len(events) == num_sequences:
            seconds.append(elapsed)
    return statistics.median(seconds) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", default="1,8,32,128,256")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    engine = Engine(load(LoadConfig(DEFAULT_MODEL_ID)), EngineConfig(max_batch_tokens=8192))
    engine.runner.launch = _launch  # type: ignore[method-assign]
    for num_sequences in map(int, options.sequences.split(",")):
        cost = microseconds_per_step(engine, num_sequences, options.steps)
        print(f"{num_sequences:4} sequences: {cost:7.0f} us per step")


if __name__ == "__main__":
    main()
