"""How long a step takes at least: the bytes it has to read, the arithmetic it has to do."""

import torch
from torch import nn

from bench.device import Ceilings
from engine.kv_cache import AttentionCall
from kernels.packed_linear import PackedLinear


def linear_weights(model: nn.Module) -> list[torch.Tensor]:
    """The matrices that every token is multiplied with, each once."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | PackedLinear)]
    return list({id(weight): weight for weight in (m.weight for m in linears)}.values())


def decode_bound_s(
    weights: list[torch.Tensor],
    calls: list[AttentionCall],
    batch: int,
    context: int,
    cache_bytes: int,
    ceilings: Ceilings,
) -> float:
    """One token for each of `batch` sequences of `context` tokens.

    Of each operation the longer of reading and computing, added up: weights are read once for
    all sequences, keys and values (`cache_bytes` an element) once for each.
    """
    gemms = sum(
        ceilings.bound_s(w.numel() * w.element_size(), 2 * w.numel() * batch) for w in weights
    )
    attention = sum(
        ceilings.bound_s(
            batch * seen * call.num_kv_heads * (call.head_dim + call.value_dim) * cache_bytes,
            2 * batch * seen * call.num_heads * (call.head_dim + call.value_dim),
        )
        for call in calls
        if (seen := min(context, call.mask.window))
    )
    return gemms + attention


def prefill_flops(
    weights: list[torch.Tensor], calls: list[AttentionCall], num_tokens: int
) -> float:
    """Of a prompt from its start, whose last token alone has logits."""
    *layers, head = weights
    gemms = 2 * num_tokens * sum(w.numel() for w in layers) + 2 * head.numel()
    attention = 0.0
    for call in calls:
        window = min(call.mask.window, num_tokens)
        pairs = num_tokens * window - window * (window - 1) / 2
        attention += 2 * pairs * call.num_heads * (call.head_dim + call.value_dim)
    return gemms + attention
