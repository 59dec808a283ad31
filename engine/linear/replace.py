"""The one way in which linear layers of a loaded model are replaced.

transformers builds a model of `nn.Linear`, or of a quantiser's subclasses of it. Layers that
compute the same in another way take their place: quantised weights (`engine.linear.int8`),
several linears in one matrix product (`engine.linear.merged`), weights laid out for the CPU
(`engine.linear.packed`), our own kernel for few rows (`engine.linear.gemv`), sums in one order for
any batch (`engine.linear.invariant`). Each is a module with the attributes of `Linear`, and each is
put into the model by `replace_linears`.
`engine.loading.loader` decides the order.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Linear(Protocol):
    """What a model may expect of its linear layers: y = x W^T + b.

    x is [..., in_features] and y is [..., out_features].
    """

    in_features: int
    out_features: int

    @property
    def bias(self) -> Tensor | None:
        """[out_features], or None."""

    def forward(self, x: Tensor, /) -> Tensor: ...


def replace_linears(model: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> None:
    """Replace linears of the model in place: each by what `make` returns for it.

    Where `make` returns None, the linear stays. It is called once for a linear that several
    parts of the model share, and they then share the replacement. Weights that nothing else
    refers to are freed.
    """
    replacements: dict[nn.Module, nn.Module | None] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, Linear):
                continue
            if child not in replacements:
                replacements[child] = make(child)
            replacement = replacements[child]
            if replacement is not None:
                setattr(parent, name, replacement)
