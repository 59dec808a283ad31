"""Linears whose result for a row does not depend on the number of rows beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.linear.replace import replace_linears

InvariantProduct = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x W^T + b of x [..., inputs], W [outputs, inputs] and b [outputs] or None."""
_LEFT_OPERAND = dict.fromkeys(("linear", "matmul", "mm", "bmm", "mv", "dot", "_grouped_mm"), 0)
_LEFT_OPERAND |= dict.fromkeys(("addmm", "baddbmm", "addmv"), 1)
"""torch's names of matrix products, each with the place of the left operand in its arguments."""


class InvariantLinear(nn.Module):
    """y = x W^T + b, each row's sums in one order; it shares its weights with `linear`."""

    def __init__(self, linear: nn.Linear, product: InvariantProduct):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._product = product

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.weight, self.bias)


def make_invariant(model: nn.Module, product: InvariantProduct) -> None:
    """Replace every plain `nn.Linear` of the model, its head included, in place."""

    def invariant(linear: nn.Module) -> InvariantLinear | None:
        return InvariantLinear(linear, product) if type(linear) is nn.Linear else None

    replace_linears(model, invariant)


class _Products(TorchDispatchMode):
    """Collects the names of the library's matrix products that add up more than one number."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with self:  # what is made of other operations, such as einsum, is looked at in parts
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        name = func._schema.name.removeprefix("aten::")
        if name in _LEFT_OPERAND and args[_LEFT_OPERAND[name]].shape[-1] > 1:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def collecting_products() -> Iterator[set[str]]:
    """Collect the library's matrix products that run in this context, by torch's names.

    Their order of sums depends on the number of rows. An outer product, such as that of
    positions and rotary frequencies, adds nothing up and is not collected.
    """
    with _Products() as products:
        yield products.names
