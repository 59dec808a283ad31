"""Helpers of tests that look at the last bit: distances in ulp, and the device to test on."""

import torch
from torch import Tensor

from tests.interpreter import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Return how many representable numbers apart the elements of `a` and `b` are."""
    assert a.dtype == b.dtype
    return (_ordinal(a) - _ordinal(b)).abs()


def _ordinal(x: Tensor) -> Tensor:
    bits = x.contiguous().view(_BITS[x.dtype])
    magnitude = (bits & torch.iinfo(bits.dtype).max).long()
    return torch.where(bits < 0, -magnitude, magnitude)
