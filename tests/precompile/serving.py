"""Serves requests of every kind on a GPU that is not present, and prints which kernels they had to
compile after the engine was ready.

    python -m tests.precompile.serving VOCAB_SIZE DTYPE

This is a process of its own because Triton decides at its import whether it compiles or
interprets, and keeps in memory what it has compiled.
"""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from triton import knobs

from engine.core.config import EngineConfig
from engine.core.request import Finished, Request, SamplingParams, StoppingParams
from engine.engine import Engine
from engine.loading.checkpoint import Checkpoint
from engine.loading.loader import LoadedModel, prepare_model
from kernels.ops import TRITON
from precompile.compile import _accept_any_logits
from precompile.fake_driver import TARGETS, compiling_for
from tests.engine.models import FAMILIES, build, byte_tokenizer
from tests.engine.sampling.test_slots import USED

NEUTRAL = SamplingParams()
STOPPING = StoppingParams(2, ignore_eos=True)
PROMPT = list(b"again and again")


def model(vocab_size: int, dtype: torch.dtype) -> LoadedModel:
    config_class, options = FAMILIES["llama"]
    options = options | {"num_hidden_layers": 1, "vocab_size": vocab_size}
    built = build(config_class, **options)
    nn.Module.to(built, dtype=dtype)
    checkpoint = Checkpoint(Path("/nowhere"), "tiny-llama")
    return prepare_model(built, byte_tokenizer(), checkpoint, TRITON, _accept_any_logits)


def samplings() -> Iterator[SamplingParams]:
    """Yield each parameter alone, and many at once; a new one is among them by itself."""
    names = [field.name for field in fields(SamplingParams)]
    for name in names:
        yield SamplingParams(**{name: USED[name]})
        yield SamplingParams(**{name: USED[name], "logprobs": True})
    rng = random.Random(0)
    for _ in range(60):
        chosen = [name for name in names if rng.random() < 0.4]
        yield SamplingParams(**{name: USED[name] for name in chosen})
    for num_top in (1, 5, 8, 9, 16, 17, 20):
        yield SamplingParams(top_n_tokens=num_top, do_sample=True)


def requests(engine: Engine) -> Iterator[list[Request]]:
    """Yield requests that are served together: alone, forked, mixed, guided, and with prompts that
    report logprobs.
    """
    kinds = list(samplings())
    for number, kind in enumerate(kinds):
        yield [Request(f"{number}", PROMPT, kind, STOPPING)]
    yield [Request(f"mixed {i}", PROMPT[i:], kind, STOPPING) for i, kind in enumerate(kinds[:8])]
    for number, kind in enumerate(kinds[::5]):
        for top in (0, 1, 20):
            options: dict[str, Any] = {"prompt_logprobs": True, "prompt_top_tokens": top}
            first = Request("long", PROMPT[:3], kind, StoppingParams(6, ignore_eos=True))
            yield [first, Request(f"prompt {number}", PROMPT, kind, STOPPING, **options)]
        grammar = engine.grammars.regex("[a-z]+")
        # Every token is 0, which the grammar may not allow: one token is enough.
        once = StoppingParams(1)
        yield [Request(f"guided {number}", PROMPT, kind, once, grammar=grammar)]


def serve(engine: Engine, batch: list[Request]) -> None:
    for request in batch:
        engine.add(request)
    while engine.has_work:
        for request_id, event in engine.step():
            is_guided = request_id.startswith("guided")
            assert isinstance(event, Finished) or is_guided or not hasattr(event, "message"), event


@torch.inference_mode()
def main(vocab_size: int, dtype: str) -> None:
    compiled: list[str] = []

    def listen(src: Any, **_: object) -> None:
        compiled.append(src.name)

    with compiling_for(TARGETS[90]):
        loaded = model(vocab_size, getattr(torch, dtype))
        config = EngineConfig(max_sequences=16, max_batch_tokens=64, num_blocks=64)
        engine = Engine(loaded, config)
        engine.warm_up()
        knobs.compilation.listener = listen
        for batch in requests(engine):
            serve(engine, batch)
        engine.close()
    print(json.dumps(compiled))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
