"""Linears of few rows in a kernel of our own, where it is faster than the library on this GPU.

Which of the two is faster depends on the GPU, on the shape and on the number of rows, so both are
timed when a model is loaded, with the model's own weights. The choice holds as long as the model:
captured steps contain the kernel that was chosen.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.device.timer import Timer
from engine.linear.replace import replace_linears
from kernels.gemv import VECTOR_BYTES, can_gemv
from kernels.ops import Gemv, Ops

logger = logging.getLogger(__name__)

_ROWS = (1, 2, 4, 8)
"""Numbers of rows that are timed. For one in between, that of the next counts."""
_MARGIN = 0.97
"""Our kernel has to take less than this share of the library's time."""
_MOST_LINEARS = 8
_MOST_BYTES = 512 << 20
"""How much of the linears of one shape is read for a measurement."""


@dataclass(frozen=True, slots=True)
class LinearShape:
    """What the time of a linear depends on."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    has_bias: bool

    @classmethod
    def of(cls, linear: "nn.Linear | GemvLinear") -> "LinearShape":
        out_features, in_features = linear.weight.shape
        return cls(out_features, in_features, linear.weight.dtype, linear.bias is not None)

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}" + " with bias" * self.has_bias


class GemvLinear(nn.Module):
    """y = x W^T + b, by our own kernel for some numbers of rows and by the library for others.

    rows        of `_ROWS`, those for which our kernel is used
    prefetches  whether, for one row, weights are brought to the L2 cache while the kernel ahead
                of ours runs
    """

    def __init__(self, linear: nn.Linear, gemv: Gemv, rows: frozenset[int]):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rows, self.prefetches = rows, False
        self._gemv = gemv

    def forward(self, x: Tensor) -> Tensor:
        num_rows = x.shape[:-1].numel()
        if num_rows == 0 or 1 << (num_rows - 1).bit_length() not in self.rows:
            return F.linear(x, self.weight, self.bias)
        x = x.contiguous()  # which computes a deferred tensor
        if x.data_ptr() % VECTOR_BYTES:
            return F.linear(x, self.weight, self.bias)
        return self._gemv(x, self.weight, self.bias, self.prefetches and num_rows == 1)


def use_gemv(model: nn.Module, ops: Ops, timer: Timer) -> None:
    """Replace the plain linears whose shape our kernel is faster for, in place.

    Subclasses of `nn.Linear` stay: they compute something else.
    """
    by_shape: dict[LinearShape, list[nn.Linear]] = defaultdict(list)
    for module in model.modules():
        if type(module) is nn.Linear and can_gemv(module.weight):
            by_shape[LinearShape.of(module)].append(module)
    chosen = {shape: _choose(linears, ops, timer) for shape, linears in by_shape.items()}
    replace_linears(model, partial(_replacement, ops=ops, chosen=chosen))
    described = [f"{shape} at {_listed(rows)}" for shape, rows in chosen.items() if rows]
    logger.info("linears of few rows in our own kernel: %s", "; ".join(described) or "none")


def _replacement(
    linear: nn.Module, ops: Ops, chosen: dict[LinearShape, dict[int, float]]
) -> GemvLinear | None:
    if type(linear) is not nn.Linear:
        return None
    rows = chosen.get(LinearShape.of(linear))
    return GemvLinear(linear, ops.gemv, frozenset(rows)) if rows else None


def _listed(rows: dict[int, float]) -> str:
    return ", ".join(f"{count} ({share:.0%})" for count, share in rows.items())


@torch.inference_mode()
def _choose(linears: list[nn.Linear], ops: Ops, timer: Timer) -> dict[int, float]:
    """Return the numbers of rows at which our kernel is faster, and its share of the time."""
    first = linears[0].weight
    most = min(_MOST_LINEARS, max(_MOST_BYTES // (first.numel() * first.itemsize), 1))
    weights = [(linear.weight, linear.bias) for linear in linears[:most]]
    shares: dict[int, float] = {}
    for num_rows in _ROWS:
        x = first.new_zeros(1, num_rows, first.shape[1])
        ours = timer(partial(_run_all, ops.gemv, x, weights))
        library = timer(partial(_run_all, F.linear, x, weights))
        if ours is not None and library is not None and ours < _MARGIN * library:
            shares[num_rows] = ours / library
    return shares


def _run_all(
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weights: Sequence[tuple[Tensor, Tensor | None]],
) -> None:
    for weight, bias in weights:
        linear(x, weight, bias)
