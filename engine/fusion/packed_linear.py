"""Linear layers whose weights are laid out once for the CPU's vector units.

torch's own linear hands row-major weights to BLAS, which rearranges them at every call.
oneDNN takes them rearranged, as compiled and frozen models have it. All linears of
SmolLM2-135M in float32 on two Zen 4 cores, in ms a forward, where reading the weights
takes 18:

    rows        1     2     4     8    16    32    64   256
    torch    51.5  85.6  68.7  60.2  73.1  95.0   168   539
    packed   29.9  30.5  31.5  27.8  39.5  57.5   102   356
"""

from typing import cast

import torch
from torch import Tensor, nn

_ROWS_HINT = 32
"""The layout that oneDNN picks for so many rows is as good as its best for 1 and for 256."""


class PackedLinear(nn.Module):
    """y = x W^T + b, as `nn.Linear`; x is [..., in_features] of the weights' type."""

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
        """[out_features, in_features], laid out anew: for models that look at it."""
        return self._packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:  # a step that samples nothing asks for the logits of no row
            return x.new_empty(*x.shape[:-1], self.out_features)
        packed = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return cast(Tensor, packed)


def pack_linears(model: nn.Module) -> None:
    """Swap every plain `nn.Linear` on the CPU for its packed form, in place.

    Subclasses stay: they compute something else. Weights that nothing else refers to,
    an embedding for one, are freed.
    """
    packed: dict[nn.Linear, PackedLinear] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and _can_pack(child.weight):
                packed[child] = packed.get(child) or PackedLinear(child)
                setattr(parent, name, packed[child])


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype is torch.float32 or (
        weight.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
