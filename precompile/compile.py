"""Compiles the kernels that serving a model launches, for one GPU and one type of weights.

The engine itself launches them, on a driver that compiles and computes nothing: the model is
loaded, sampling is prepared as at any start, and one request is served.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.core.config import BLOCK_SIZE, EngineConfig, LoadConfig
from engine.core.request import (
    Failed,
    Request,
    SamplingParams,
    StoppingParams,
)
from engine.engine import Engine
from engine.loading.loader import load
from engine.loading.sizing import decide_limits, run_largest_step
from kernels.ops import TRITON
from kernels.target import Target
from precompile.fake_driver import compiling_for
from precompile.untrained import untrained

_REQUEST = Request("", [0] * 5, SamplingParams(), StoppingParams(3, ignore_eos=True))
_NUM_BLOCKS = 64
"""More than the requests need that are served here, and fewer than the longest sequence would."""
_MAX_BATCH_TOKENS, _MAX_SEQUENCES = 8192, 256
"""A GPU's defaults. They matter because block tables are as wide as the longest step needs."""


def compile_kernels(
    model_id: str,
    dtype: str,
    target: Target,
    max_total_tokens: int | None = None,
    config_only: bool = False,
) -> float:
    """Compile the kernels that serving this model in this type launches on this GPU.

    `config_only` says that `model_id` is a folder whose weights may not be there yet.

    `max_total_tokens` is the value that the server will be started with. None stands for the
    model's maximum, which is the server's default where the KV cache has room for one
    sequence of that length. Returns the seconds that it took.
    """
    start = time.perf_counter()
    logging.getLogger("engine").setLevel(logging.ERROR)
    with compiling_for(target):
        if config_only:
            loaded = untrained(
                Path(model_id), getattr(torch, dtype), TRITON, _accept_any_logits, _timer()
            )
        else:
            load_config = LoadConfig(model_id, dtype=dtype, device="cpu")
            loaded = load(load_config, ops=TRITON, check=_accept_any_logits, timer=_timer())
        longest = max_total_tokens or loaded.max_positions
        config = EngineConfig(
            max_sequences=_MAX_SEQUENCES,
            max_batch_tokens=_MAX_BATCH_TOKENS,
            max_total_tokens=max_total_tokens,
            num_blocks=-(-longest // BLOCK_SIZE),
        )
        with _without_matrix_products():
            run_largest_step(loaded, _MAX_BATCH_TOKENS, _MAX_SEQUENCES)
            limits = replace(decide_limits(loaded, config), num_blocks=_NUM_BLOCKS)
            engine = Engine(loaded, config, limits)
            engine.prepare_sampling()
            _serve(engine, _REQUEST)
        engine.close()
    return time.perf_counter() - start


def _accept_any_logits(
    actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype
) -> str | None:
    """Accept the zeros that kernels return which are compiled and not run."""
    del actual, expected, dtype
    return None


def _timer() -> Callable[[Callable[[], object]], float]:
    """Return a timer to which each work seems to take longer than the one before it.

    What is timed is launched, and our own kernels, timed before the library's, are chosen.
    """
    seconds = count(1)

    def launch(work: Callable[[], object]) -> float:
        work()
        return float(next(seconds))

    return launch


@contextmanager
def _without_matrix_products() -> Iterator[None]:
    """Have `F.linear` return zeros, whose values nothing reads: on a CPU it takes most time."""
    linear = F.linear
    F.linear = _zeros
    try:
        yield
    finally:
        F.linear = linear


def _zeros(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    del bias
    return input.new_zeros(*input.shape[:-1], weight.shape[0])


@torch.inference_mode()
def _serve(engine: Engine, request: Request) -> None:
    engine.add(request)
    while engine.has_work:
        for _, event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
