"""Linears that read the same input, computed as one GEMM."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Joint(nn.Module):
    """The rows of several weight matrices as one, and what it last computed.

    The first member called with an input computes for all; the others find their slice.
    """

    def __init__(self, linears: Sequence[nn.Linear]):
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        first = linears[0]
        self.linear = nn.Linear(
            first.in_features, sum(self.sizes), first.bias is not None, device="meta"
        )
        self.linear.weight = _joined([linear.weight for linear in linears])
        if first.bias is not None:
            self.linear.bias = _joined([linear.bias for linear in linears])
        self._input: Any = None
        self._slices: dict[int, Tensor] = {}

    def take(self, x: Any, index: int) -> Tensor:
        if x is not self._input or index not in self._slices:
            self._input = x
            self._slices = dict(enumerate(self.linear(x).split_with_sizes(self.sizes, dim=-1)))
        mine = self._slices.pop(index)
        if not self._slices:
            self._input = None
        return mine


class MemberLinear(nn.Module):
    """One of the merged linears: its parent calls it as ever."""

    def __init__(self, joint: _Joint, index: int):
        super().__init__()
        self.joint = joint
        self._index = index
        self.in_features = joint.linear.in_features
        self.out_features = joint.sizes[index]

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features]: for models that look at it."""
        return self.joint.linear.weight.detach().split(self.joint.sizes)[self._index]

    @property
    def bias(self) -> Tensor | None:
        bias = self.joint.linear.bias
        return None if bias is None else bias.detach().split(self.joint.sizes)[self._index]

    def forward(self, x: Any) -> Tensor:
        return self.joint.take(x, self._index)


def merge(parent: nn.Module, members: Mapping[str, nn.Linear]) -> None:
    """Replace these linears of `parent`, all with or all without a bias, in place.

    Their weights become views of the joint ones, so that `unmerge` needs no memory.
    """
    joint = _Joint(list(members.values()))
    for index, (name, linear) in enumerate(members.items()):
        member = MemberLinear(joint, index)
        linear.weight.data = member.weight
        if member.bias is not None:
            linear.bias.data = member.bias
        setattr(parent, name, member)


def unmerge(parent: nn.Module, members: Mapping[str, nn.Linear]) -> None:
    """Undo `merge`."""
    for name, linear in members.items():
        setattr(parent, name, linear)


def _joined(parts: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([part.detach() for part in parts]), requires_grad=False)
