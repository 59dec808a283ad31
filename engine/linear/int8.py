"""A linear layer of 8-bit weights that computes in the type of its input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """y = x W^T + b, where W is int8, scaled by the largest magnitude of each row.

    weight [out_features, in_features] int8; absmax [out_features] float32; x is
    [..., in_features] of any floating type, and W is converted to that type for each call.
    """

    def __init__(self, weight: Tensor, absmax: Tensor, bias: nn.Parameter | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(absmax[:, None] / 127, requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.empty_like(self.weight, dtype=x.dtype)
        torch.mul(self.weight, self.scale, out=weight)  # one pass, rounded once
        return F.linear(x, weight, self.bias)
