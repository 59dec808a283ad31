"""Chooses the linears whose weights are brought to the L2 cache before they are needed.

While attention and the small kernels run, the memory has time to spare. A linear in our own kernel
can use it, since it starts before the kernel ahead of it has ended. Whether that gains anything, or
only takes the cache from others, shows in a whole decode step, which is timed with and without.
"""

import logging
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from engine.attention.interface import ATTENTION_NAME
from engine.attention.kv_cache import AttentionCall, bind_kv_cache
from engine.attention.plan import FixedTables, StepSequences
from engine.core.config import BLOCK_SIZE
from engine.device.timer import Timer
from engine.linear.gemv import GemvLinear, LinearShape
from engine.loading.probe import use_attention
from kernels.gemv import can_prefetch
from kernels.ops import Ops

logger = logging.getLogger(__name__)

_MARGIN = 0.995
"""A step has to take less than this share of the time that it took before."""
_CONTEXT = 1024
"""Tokens of the sequence in the step that is timed, if the model has as many positions."""
_NUM_BLOCKS = 8
"""All positions share a few blocks of the cache: which values it holds does not matter."""


def choose_prefetch(
    model: PreTrainedModel, calls: list[AttentionCall], ops: Ops, timer: Timer
) -> None:
    """Have the linears prefetch that make a decode step of one row faster, shape by shape.

    Leaves the model with our attention function selected and a small cache bound.
    """
    by_shape: dict[LinearShape, list[GemvLinear]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, GemvLinear) and 1 in module.rows and can_prefetch(module.weight):
            by_shape[LinearShape.of(module)].append(module)
    if not by_shape:
        return
    decode = _decode_step(model, calls, ops)
    first = best = timer(decode)
    chosen = []
    for shape, linears in by_shape.items():
        _set(linears, True)
        seconds = timer(decode)
        if best is not None and seconds is not None and seconds < _MARGIN * best:
            best = seconds
            chosen.append(str(shape))
        else:
            _set(linears, False)
    gain = f" ({best / first:.1%} of a decode step's time)" if chosen and best and first else ""
    logger.info("linears that prefetch their weights: %s%s", "; ".join(chosen) or "none", gain)


def _set(linears: list[GemvLinear], prefetches: bool) -> None:
    for linear in linears:
        linear.prefetches = prefetches


def _decode_step(
    model: PreTrainedModel, calls: list[AttentionCall], ops: Ops
) -> Callable[[], object]:
    """Return the forward of a decode step of one sequence."""
    device = model.device
    use_attention(model, ATTENTION_NAME)
    context = bind_kv_cache(calls, _NUM_BLOCKS, model.dtype, device, ops)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _CONTEXT
    length = min(longest, _CONTEXT)
    tables = np.arange(-(-length // BLOCK_SIZE))[None] % _NUM_BLOCKS
    one = np.ones(1, dtype=np.int64)
    step = StepSequences(np.zeros(1, np.int64), one * (length - 1), one)
    metadata = FixedTables(ops, calls, tables, device).metadata(step)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    position_ids = torch.from_numpy(step.positions)[None].to(device)

    @torch.inference_mode()
    def decode() -> object:
        context.begin(metadata)
        return model(input_ids=ids, position_ids=position_ids, use_cache=False).logits

    return decode
