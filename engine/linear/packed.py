"""Linear layers whose weights are laid out once for the CPU's vector units.

torch's own linear hands row-major weights to BLAS, which rearranges them at every call.
oneDNN accepts weights that were rearranged once, as torch's compiler does when it freezes a
model. The table has the milliseconds that all linears of SmolLM2-135M take in a forward, in
float32 on two Zen 4 cores, where reading the weights alone takes 18 ms:

    rows        1     2     4     8    16    32    64   256
    torch    51.5  85.6  68.7  60.2  73.1  95.0   168   539
    packed   29.9  30.5  31.5  27.8  39.5  57.5   102   356
"""

from typing import cast

import torch
from torch import Tensor, nn

from engine.linear.replace import replace_linears

_ROWS_HINT = 32
"""The layout that oneDNN picks for this many rows is as fast as its best for 1 row and for 256."""


class PackedLinear(nn.Module):
    """y = x W^T + b, as `nn.Linear` computes it; x is [..., in_features] of the weights' type."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach(), _ROWS_HINT
        )

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], for models that read it: a row-major copy at each access."""
        return self._packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:  # a step that samples nothing needs logits of no row
            return x.new_empty(*x.shape[:-1], self.out_features)
        packed = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return cast(Tensor, packed)


def pack_linears(model: nn.Module) -> None:
    """Replace every plain `nn.Linear` that oneDNN can compute by its packed form, in place.

    Subclasses of `nn.Linear` stay: they compute something else.
    """
    replace_linears(model, _packed)


def _packed(linear: nn.Module) -> PackedLinear | None:
    if type(linear) is nn.Linear and _can_pack(linear.weight):
        return PackedLinear(linear)
    return None


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype is torch.float32 or (
        weight.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
