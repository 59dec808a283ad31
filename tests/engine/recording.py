"""Recording a step's operations on the device, one after the other.

A recording counts them, refuses those that would make the host wait for the device, and replays
them as a CUDA graph does, without the Python around them.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.ops import Ops

aten = torch.ops.aten
# These launch no kernel: they allocate memory.
_FREE = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}
# These read the device's memory into Python, which waits for everything launched before.
_WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.unique_dim.default,
    aten._unique2.default,
}


_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
"""These wait if they index by a mask: only the device knows how many elements it selects."""


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype is torch.bool for index in indices)


class HostWaits(AssertionError):
    """The recorded work would make the host wait for the device."""


@dataclass(frozen=True, slots=True)
class Call:
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def is_view(self) -> bool:
        """Whether the result is only a view of the arguments' memory."""
        if not getattr(self.func, "is_view", False):
            return False
        return _storages(self.result) <= _storages((self.args, self.kwargs))

    @property
    def name(self) -> str:
        return str(getattr(self.func, "__name__", self.func))


def _storages(tree: Any) -> set[int]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _tensors(result: Any) -> list[Tensor]:
    """Return the tensors of a result, those that a dataclass holds included."""
    leaves = tree_leaves(result)
    if len(leaves) == 1 and is_dataclass(leaves[0]):
        leaves = [getattr(leaves[0], field.name) for field in fields(leaves[0])]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


class Recording(TorchDispatchMode):
    """Records everything that runs while it is active, kernels of `recorded(ops)` included."""

    active: "Recording | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.touched: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> "Recording":
        Recording.active = self
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        Recording.active = None
        super().__exit__(*exc)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _WAITS or (func in _INDEXING and _has_mask(args[1])):
            raise HostWaits(f"{func} reads the device")
        if func._schema.is_mutable:
            self.remember((args, kwargs))
        return self.run(func, args, kwargs or {})

    def remember(self, tree: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        # An expanded tensor, one of whose elements has several places, is never written to.
        own = [tensor for tensor in tensors if 0 not in tensor.stride() or tensor.numel() < 2]
        self.touched += [(tensor, tensor.clone()) for tensor in own]

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        self.calls.append(Call(func, args, kwargs, result))
        return result

    @property
    def launches(self) -> list[Call]:
        """The calls for which a GPU would run a kernel."""
        return [call for call in self.calls if not call.is_view and call.func not in _FREE]

    def replay(self) -> None:
        """Run the same operations on the same memory, without the Python around them."""
        for call in self.calls:
            if call.is_view or call.func in _FREE:
                continue
            again = call.func(*call.args, **call.kwargs)
            for old, new in zip(_tensors(call.result), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorded(ops: Ops) -> Ops:
    """Return the same kernels, each of which is one operation in an active recording."""
    kernels: dict[str, Any] = {
        field.name: recorded_kernel(getattr(ops, field.name))
        for field in fields(ops)
        if callable(getattr(ops, field.name))
    }
    return replace(ops, **kernels)


def recorded_kernel(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        recording = Recording.active
        if recording is None:
            return kernel(*args, **kwargs)
        with torch.utils._python_dispatch._disable_current_modes():
            recording.remember((args, kwargs))
            return recording.run(kernel, args, kwargs)

    call.__name__ = kernel.__name__
    return call


def capture(work: Callable[[], Any]) -> tuple[Recording, Any]:
    """Record `work`, in place of a CUDA graph's capture.

    Unlike a CUDA graph's capture this runs what it records, so the changed memory is restored.
    """
    with Recording() as recording:
        result = work()
    for tensor, before in reversed(recording.touched):
        tensor.copy_(before)
    return recording, result
