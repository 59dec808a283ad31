"""Compare guided with unguided decoding: tokens per second of the same engine, in turns.

    python -m bench.guided --concurrency 8

Both decode the same prompts. The unguided requests generate as many tokens as the guided ones
did.
"""

import argparse
import statistics
import time
from itertools import count

from engine.core.config import DEFAULT_MODEL_ID, EngineConfig, LoadConfig
from engine.core.request import (
    Failed,
    Finished,
    Request,
    SamplingParams,
    StoppingParams,
)
from engine.engine import Engine
from engine.loading.loader import load

_SCHEMA = {
    "type": "object",
    "properties": {
        "people": {
            "type": "array",
            "minItems": 2,
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {
                    "first_name": {"type": "string", "maxLength": 12},
                    "age": {"type": "integer", "minimum": 0, "maximum": 120},
                    "favourite_colour": {"enum": ["red", "green", "blue"]},
                    "motto": {"type": "string", "minLength": 20, "maxLength": 60},
                },
                "required": ["first_name", "age", "favourite_colour", "motto"],
            },
        }
    },
    "required": ["people"],
}
_PROMPT = "<|im_start|>user\nTwo people, as JSON.<|im_end|>\n<|im_start|>assistant\n"
_numbers = count()


def run(engine: Engine, requests: list[Request], concurrency: int) -> tuple[float, list[int]]:
    """Run the requests, `concurrency` at once; return the seconds and each request's tokens."""
    waiting = requests[::-1]
    lengths: dict[str, int] = {}
    started = time.perf_counter()
    for _ in range(concurrency):
        engine.add(waiting.pop())
    while engine.has_work:
        for request_id, event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Finished):
                lengths[request_id] = event.num_generated_tokens
                if waiting:
                    engine.add(waiting.pop())
    seconds = time.perf_counter() - started
    return seconds, [lengths[request.request_id] for request in requests]


def make_requests(engine: Engine, stopping: list[StoppingParams], guided: bool) -> list[Request]:
    grammar = engine.grammars.json_schema(_SCHEMA) if guided else None
    prompt_ids = engine.tokenizer.encode(_PROMPT)
    return [
        Request(
            f"{next(_numbers)}",
            prompt_ids,
            SamplingParams(do_sample=True, seed=seed),
            stops,
            grammar=grammar,
        )
        for seed, stops in enumerate(stopping)
    ]


def compare(engine: Engine, concurrency: int, num_requests: int, rounds: int) -> list[float]:
    """Return the ratio of guided to unguided tokens per second, for each round."""
    ratios = []
    for _ in range(rounds):
        free = [StoppingParams(256)] * num_requests
        guided_s, lengths = run(engine, make_requests(engine, free, True), concurrency)
        same = [StoppingParams(n, ignore_eos=True) for n in lengths]
        unguided_s, _ = run(engine, make_requests(engine, same, False), concurrency)
        total = sum(lengths)
        print(f"guided {total / guided_s:.1f} tok/s, unguided {total / unguided_s:.1f}", flush=True)
        ratios.append(unguided_s / guided_s)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    engine = Engine(load(LoadConfig(DEFAULT_MODEL_ID)), EngineConfig())
    ratios = compare(engine, options.concurrency, options.requests, options.rounds)
    rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"guided / unguided: {statistics.median(ratios):.2f} (rounds {rounds})")


if __name__ == "__main__":
    main()
