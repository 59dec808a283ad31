"""Linears whose result for a row does not depend on the number of rows beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.core.errors import LoadError
from engine.linear.merged import MergedLinear
from engine.linear.replace import replace_linears

InvariantProduct = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x W^T + b of x [..., inputs], W [outputs, inputs] and b [outputs] or None."""
_LEFT_OPERAND = dict.fromkeys(("linear", "matmul", "mm", "bmm", "mv", "dot", "_grouped_mm"), 0)
_LEFT_OPERAND |= dict.fromkeys(("addmm", "baddbmm", "addmv"), 1)
"""torch's names of matrix products, each with the place of the left operand in its arguments."""
_TRIED_ROWS = 130
"""More than a tile of the most rows has."""


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
    """Replace every plain `nn.Linear` of the model, its head included, in place.

    Raises LoadError for a linear of another kind, such as a quantised one, and if on this device
    the number of rows changes a row after all. That is tried for each shape of weights, which
    compiles the kernels of few and of many rows, too.
    """
    tried = set()

    def invariant(linear: nn.Module) -> InvariantLinear | None:
        if isinstance(linear, MergedLinear):
            return None  # its joint linear is replaced
        if type(linear) is not nn.Linear:
            raise LoadError(
                f"--batch-invariant cannot compute a {type(linear).__name__}: leave out the flag"
            )
        replacement = InvariantLinear(linear, product)
        if (shape := (linear.weight.shape, linear.bias is None)) not in tried:
            tried.add(shape)
            _try(replacement)
        return replacement

    replace_linears(model, invariant)


@torch.inference_mode()
def _try(linear: InvariantLinear) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TRIED_ROWS, linear.in_features, generator=generator).to(linear.weight)
    together = linear(x)
    for row in (0, _TRIED_ROWS - 1):
        if not torch.equal(linear(x[row : row + 1]), together[row : row + 1]):
            raise LoadError(
                "--batch-invariant cannot be had on this GPU: its matrix units give a row other "
                "bits among many rows. Leave out the flag."
            )


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
