"""What the engine launches: a model loaded, warmed up, and asked for each kind of sampling."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import product
from unittest.mock import patch

import torch
from torch import Tensor

from engine.core.config import BLOCK_SIZE, EngineConfig, LoadConfig
from engine.core.request import (
    Failed,
    Request,
    SamplingParams,
    StoppingParams,
)
from engine.engine import Engine
from engine.loading import probe
from engine.loading.loader import load
from engine.loading.sizing import run_largest_step
from kernels.ops import TRITON
from kernels.paged_attention.tuning import Target
from precompile.fake_driver import stage

_NUM_TOP = 5
"""Alternatives asked for at most, by default: more is another kernel."""
_MAX_BATCH_TOKENS, _MAX_SEQUENCES = 4096, 256
"""What a GPU has, where nothing else is set: block tables are as wide as the longest step."""


def play(model_id: str, dtype: str, target: Target, max_total_tokens: int | None = None) -> float:
    """Have Triton compile, for this GPU, what serving this model in this type launches there.

    Takes as many seconds as it returns.

    `max_total_tokens` is what the server will be started with; None is the model's maximum,
    which it will have where its KV cache has room for one such sequence.
    """
    start = time.perf_counter()
    logging.getLogger("engine").setLevel(logging.ERROR)
    with stage(target), _as_on_a_gpu():
        loaded = load(LoadConfig(model_id, dtype=dtype, device="cpu"))
        longest = max_total_tokens or loaded.max_positions
        config = EngineConfig(
            max_sequences=_MAX_SEQUENCES,
            max_batch_tokens=_MAX_BATCH_TOKENS,
            max_total_tokens=max_total_tokens,
            num_blocks=-(-longest // BLOCK_SIZE),
        )
        with patch("torch.nn.functional.linear", _no_linear):
            run_largest_step(loaded, _MAX_BATCH_TOKENS, _MAX_SEQUENCES)
            engine = Engine(loaded, config)
            for request in _requests(engine):
                _serve(engine, request)
        engine.close()
    return time.perf_counter() - start


def _no_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What takes the time on a CPU."""
    del bias
    return x.new_zeros(*x.shape[:-1], weight.shape[0])


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """The GPU's kernels and layouts; as nothing is computed, every answer will do."""
    with ExitStack() as stack:
        stack.enter_context(patch("engine.loading.loader.ops_for", lambda _: TRITON))
        stack.enter_context(patch("engine.loading.loader.pack_linears", lambda _: None))
        anything = dict.fromkeys(probe._TOLERANCE, math.inf)
        stack.enter_context(patch.dict(probe._TOLERANCE, anything))
        yield


def _requests(engine: Engine) -> Iterator[Request]:
    """Each kind of sampling for which kernels are compiled apart."""
    greedy = SamplingParams()
    sampled = SamplingParams(do_sample=True, temperature=0.7, top_k=20, top_p=0.9, logprobs=True)
    samplings = [greedy, replace(greedy, logprobs=True), replace(sampled, watermark=True)]
    samplings += [
        replace(sampled, repetition_penalty=penalty, top_n_tokens=num_top)
        for penalty, num_top in product((1.0, 1.1), (0, _NUM_TOP))
    ]
    stopping = StoppingParams(max_new_tokens=3, ignore_eos=True)
    for number, sampling in enumerate(samplings):
        yield Request(f"{number}", [0] * 5, sampling, stopping)
    # Only zeros are drawn, which the grammar may not allow: one is enough.
    once = StoppingParams(max_new_tokens=1)
    yield Request("guided", [0] * 5, greedy, once, grammar=engine.grammars.regex("[a-z]+"))


@torch.inference_mode()
def _serve(engine: Engine, request: Request) -> None:
    engine.add(request)
    while engine.has_work:
        for _, event in engine.step():
            if isinstance(event, Failed) and request.grammar is None:
                raise RuntimeError(event.message)
