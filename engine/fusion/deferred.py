"""Tensors whose last operation waits for the next, so that one kernel can do both.

A transformers model computes `residual + x` and then `norm(...)`, `act(gate)` and then `* up`,
`apply_rotary_pos_emb(q, k, ...)` and then attention. `engine.fusion.find` makes the first of each
pair return a deferred tensor. Where the expected second operation follows, both run as one
kernel. Any other torch function, method or operator gets the tensor itself, computed as the
model would have computed it. So fusing never restricts what a model's code may do: it changes
how values are computed, never which values.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kernels.norm import NormForm
from kernels.ops import Ops
from kernels.store_kv import Rotary


class Deferred:
    """Stands in for a tensor of this shape, type and device.

    It is no tensor itself: code that reads a tensor's memory directly fails with an error.
    """

    def __init__(self, like: Tensor):
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self._value: Tensor | None = None

    def compute(self) -> Tensor:
        """Compute the tensor as the model would have."""
        raise NotImplementedError

    def materialize(self) -> Tensor:
        """Return the tensor, computed at the first call."""
        if self._value is None:
            self._value = self.compute()
        return self._value

    def fused(self, func: Callable[..., Any], other: Tensor) -> Any:
        """Return the result of `func` with `other`, or NotImplemented if they cannot be fused."""
        del func, other
        return NotImplemented

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (torch.Tensor.add, torch.Tensor.mul) and len(args) == 2 and not kwargs:
            mine, other = args if isinstance(args[0], Deferred) else args[::-1]
            if type(other) is Tensor:
                answer = mine.fused(func, other)
                if answer is not NotImplemented:
                    return answer
        args, kwargs = tree_map_only(Deferred, Deferred.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.materialize(), name)

    def __add__(self, other: Any) -> Any:
        return self.__torch_function__(torch.Tensor.add, (), (self, other))

    def __mul__(self, other: Any) -> Any:
        return self.__torch_function__(torch.Tensor.mul, (), (self, other))

    __radd__, __rmul__ = __add__, __mul__


def _delegated(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(self.materialize(), name)(*args)


for _name in ("sub", "rsub", "truediv", "rtruediv", "matmul", "pow", "neg", "getitem", "len"):
    setattr(Deferred, f"__{_name}__", _delegated(f"__{_name}__"))


class Residual(Deferred):
    """The residual stream: a sum whose addition is deferred to the norm that follows."""

    def __init__(self, ops: Ops, base: Tensor, addend: Tensor | None = None):
        super().__init__(base)
        self._ops, self._base, self._addend = ops, base, addend
        if addend is None:
            self._value = base

    def compute(self) -> Tensor:
        assert self._addend is not None
        return self._base + self._addend

    def fused(self, func: Callable[..., Any], other: Tensor) -> Any:
        if func is not torch.Tensor.add or (other.shape, other.dtype) != (self.shape, self.dtype):
            return NotImplemented
        return Residual(self._ops, self.materialize(), other)

    def norm(self, weight: Tensor | None, bias: Tensor | None, form: NormForm) -> Tensor:
        """Return the normalised stream; a deferred addition is done in the same pass."""
        if self._value is not None or self._addend is None:
            return self._ops.norm(self.materialize(), weight, bias, form)
        normed, self._value = self._ops.add_norm(self._addend, self._base, weight, bias, form)
        return normed


class Activated(Deferred):
    """An activation of `gate`, deferred to the multiplication that follows."""

    def __init__(self, ops: Ops, gate: Tensor, activation: str, original: Callable[..., Tensor]):
        super().__init__(gate)
        self._ops, self._gate = ops, gate
        self._activation, self._original = activation, original

    def compute(self) -> Tensor:
        return self._original(self._gate)

    def fused(self, func: Callable[..., Any], other: Tensor) -> Any:
        if func is not torch.Tensor.mul or (other.shape, other.dtype) != (self.shape, self.dtype):
            return NotImplemented
        return self._ops.act_mul(self._gate, other, self._activation)


class Rotated(Deferred):
    """A query or a key, [1, heads, T, dim], whose rotation is deferred to the KV write."""

    def __init__(self, source: Tensor, rotation: "Rotation", index: int):
        super().__init__(source)
        self.source, self.rotation, self._index = source, rotation, index

    def compute(self) -> Tensor:
        return self.rotation.results()[self._index]


class Rotation:
    """The rotation of a query and its key, as `rotary` describes it.

    `original` computes both as the model does.
    """

    def __init__(self, rotary: Rotary, original: Callable[[], tuple[Tensor, Tensor]]):
        self.rotary, self._original = rotary, original
        self._results: tuple[Tensor, Tensor] | None = None

    def results(self) -> tuple[Tensor, Tensor]:
        """Return the rotated query and key, computed at the first call."""
        if self._results is None:
            self._results = self._original()
        return self._results
