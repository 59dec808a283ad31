"""What tests of the last bit need: distances in ulp, and the GPU where there is one."""

import torch
from torch import Tensor

from tests.interpreter import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many steps from one representable number to the next lie between them."""
    assert a.dtype == b.dtype
    return (_ordinal(a) - _ordinal(b)).abs()


def _ordinal(x: Tensor) -> Tensor:
    bits = x.contiguous().view(_BITS[x.dtype])
    magnitude = (bits & torch.iinfo(bits.dtype).max).long()
    return torch.where(bits < 0, -magnitude, magnitude)
