"""Dense attention in float64, which the tests of paged attention compare with."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.paged_attention.mask import MaskSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = MaskSpec()
_GARBAGE = torch.tensor([math.nan, math.inf, -math.inf])


@dataclass(frozen=True)
class Sequence:
    """The last n positions of a context of L.

    query       [n, num_heads, head_dim]
    key, value  [L, num_kv_heads, head_dim or value_dim]
    """

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Case:
    """A batch of sequences and the arguments of one call of paged attention."""

    sequences: list[Sequence]
    spec: MaskSpec = EVERYTHING
    scale: float = 0.25
    softcap: float | None = None
    sinks: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    block_size: int = 16


def attend(case: Case, seq: Sequence) -> tuple[Tensor, float]:
    """Return the sequence's output, [n, num_heads, value_dim] float64, and its largest |score|."""
    query, key, value = (x.double() for x in (seq.query, seq.key, seq.value))
    if case.k_scale is not None:
        key = key * case.k_scale.double()[:, None]
    if case.v_scale is not None:
        value = value * case.v_scale.double()[:, None]
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    k = torch.arange(len(key))[None, :]
    q = k[0, len(key) - len(query) :, None]
    seen = (k <= q) & (q - k < case.spec.window) & (k // case.spec.chunk == q // case.spec.chunk)
    scores = torch.einsum("qhd,khd->hqk", query, key) * case.scale
    largest = float(scores[:, seen].abs().max())
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    if case.sinks is not None:
        column = case.sinks.double()[:, None, None].expand(-1, len(query), 1)
        scores = torch.cat([scores, column], dim=-1)
    probs = scores.softmax(dim=-1)[..., : len(key)]
    return torch.einsum("hqk,khd->qhd", probs, value), largest


def make_sequences(
    lens: list[tuple[int, int]],
    num_kv_heads: int = 1,
    group: int = 2,
    head_dim: int = 32,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    cache_dtype: torch.dtype | None = None,
) -> list[Sequence]:
    """Return sequences of random numbers, with the given numbers of (queries, keys)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return [
        Sequence(
            query=randn(n, num_kv_heads * group, head_dim),
            key=randn(length, num_kv_heads, head_dim).to(cache_dtype or dtype),
            value=randn(length, num_kv_heads, value_dim or head_dim).to(cache_dtype or dtype),
        )
        for n, length in lens
    ]


def garbage(shape: tuple[int, ...], dtype: torch.dtype, rng: np.random.Generator) -> Tensor:
    """Return a tensor of NaN and infinities: what cache slots of no sequence hold."""
    return _GARBAGE[torch.from_numpy(rng.integers(0, 3, shape))].to(dtype)
