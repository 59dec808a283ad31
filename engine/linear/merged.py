"""Linears that read the same input, computed as one matrix product."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class _JointLinear(nn.Module):
    """The weight matrices of several linears, one below the other, and their last result.

    The first member that is called with an input computes the result of all members; the
    others take their slices of it.
    """

    def __init__(self, linears: Sequence[nn.Linear]):
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        first = linears[0]
        self.linear = nn.Linear(
            first.in_features, sum(self.sizes), first.bias is not None, device="meta"
        )
        self.linear.weight = _concatenated([linear.weight for linear in linears])
        if first.bias is not None:
            self.linear.bias = _concatenated([linear.bias for linear in linears])
        self._input: Tensor | None = None
        self._slices: dict[int, Tensor] = {}

    def take(self, x: Tensor, index: int) -> Tensor:
        """Return the result of the member `index` for the input `x`."""
        if x is not self._input or index not in self._slices:
            self._input = x
            self._slices = dict(enumerate(self.linear(x).split_with_sizes(self.sizes, dim=-1)))
        result = self._slices.pop(index)
        if not self._slices:
            self._input = None
        return result

    def forget(self) -> None:
        """Let go of a result that not all members took, as their forward broke off."""
        self._input, self._slices = None, {}


class MergedLinear(nn.Module):
    """One of several merged linears. Its parent calls it as it called the original."""

    def __init__(self, joint: _JointLinear, index: int):
        super().__init__()
        self.joint = joint
        self._index = index
        self.in_features = joint.linear.in_features
        self.out_features = joint.sizes[index]

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], for models that read it."""
        return self.joint.linear.weight.detach().split(self.joint.sizes)[self._index]

    @property
    def bias(self) -> Tensor | None:
        bias = self.joint.linear.bias
        return None if bias is None else bias.detach().split(self.joint.sizes)[self._index]

    def forward(self, x: Tensor) -> Tensor:
        return self.joint.take(x, self._index)


def can_merge(linears: Sequence[nn.Linear]) -> bool:
    """Return whether these are several linears of one type, all with or all without a bias."""
    kinds = {(linear.weight.dtype, linear.bias is None) for linear in linears}
    return len(linears) > 1 and len(kinds) == 1


def merge(linears: Sequence[nn.Linear]) -> dict[nn.Module, nn.Module]:
    """Merge these linears, and return for each of them the one to replace it by.

    The weights of `linears` become views of the joint ones, so that keeping the originals, to
    put them back later, needs no memory. Weights that lie one behind the other, as
    `engine.loading.placement` has them, stay where they are.
    """
    joint = _JointLinear(linears)
    replacements: dict[nn.Module, nn.Module] = {}
    for index, linear in enumerate(linears):
        replacements[linear] = merged = MergedLinear(joint, index)
        linear.weight.data = merged.weight
        if merged.bias is not None:
            linear.bias.data = merged.bias
    return replacements


def forget_results(model: nn.Module) -> None:
    """Let go of what a forward of the model that broke off has left in merged linears."""
    for module in model.modules():
        if isinstance(module, _JointLinear):
            module.forget()


def _concatenated(parts: Sequence[Tensor]) -> nn.Parameter:
    """Return the parts as one parameter: where they lie, if they lie one behind the other."""
    parts = [part.detach() for part in parts]
    joint = _in_place(parts) if _are_neighbours(parts) else torch.cat(parts)
    return nn.Parameter(joint, requires_grad=False)


def _are_neighbours(parts: Sequence[Tensor]) -> bool:
    """Return whether the parts lie in one storage, each where the one before it ends."""
    first = parts[0]
    end, storage = first.storage_offset(), first.untyped_storage()._cdata
    for part in parts:
        if part.untyped_storage()._cdata != storage or part.storage_offset() != end:
            return False
        end += part.numel()
    return all(part.is_contiguous() for part in parts)


def _in_place(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
