"""Many small arrays packed in one buffer, so that they reach the device in one copy."""

import numpy as np
import torch
from torch import Tensor

from engine.device.host_buffers import Staging

_ALIGNMENT = 16
"""Bytes. Every array starts at a multiple of this, as a vector load requires."""
_TYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}


class PackedArrays:
    """int64, int32 and float32 arrays by name, packed in their order: plain data on the host.

    The last array may have up to `capacity` rows in other steps that share a buffer's layout.
    """

    def __init__(self, arrays: dict[str, np.ndarray], capacity: int | None = None):
        self._last = next(reversed(arrays))
        self._capacity = capacity or len(arrays[self._last])
        self._layout: dict[str, tuple[int, tuple[int, ...], np.dtype]] = {}
        end = 0
        for name, array in arrays.items():
            offset = (end + _ALIGNMENT - 1) & -_ALIGNMENT
            self._layout[name] = offset, array.shape, array.dtype
            end = offset + array.nbytes
        self._buffer = np.empty(end, dtype=np.uint8)
        for name, (offset, _, _) in self._layout.items():
            array = np.ascontiguousarray(arrays[name])
            self._buffer[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)

    @property
    def buffer(self) -> Tensor:
        """The packed bytes, [used bytes] uint8, on the host."""
        return torch.from_numpy(self._buffer)

    @property
    def max_bytes(self) -> int:
        """Size of a buffer with room for the last array at its full capacity."""
        offset, shape, dtype = self._layout[self._last]
        return offset + self._capacity * int(np.prod(shape[1:])) * dtype.itemsize

    def copy_to(self, target: Tensor, staging: Staging | None = None) -> None:
        """Fill the beginning of `target` [>= used bytes] uint8, without waiting for the device.

        The copy starts from one of the step's buffers, or else from memory that is pinned for it:
        from pageable memory it would wait for the device.
        """
        size = len(self._buffer)
        if staging is not None:
            source = staging.take(size)
            source.array[:size] = self._buffer
            target[:size].copy_(source.tensor[:size], non_blocking=True)
        else:
            pinned = self.buffer.pin_memory() if target.is_cuda else self.buffer
            target[:size].copy_(pinned, non_blocking=True)

    def upload(self, device: torch.device, staging: Staging | None = None) -> dict[str, Tensor]:
        """Return the arrays on a device; on the CPU they share this object's buffer."""
        if device.type == "cpu":
            return self.unpack(self.buffer)
        target = torch.empty(len(self._buffer), dtype=torch.uint8, device=device)
        self.copy_to(target, staging)
        return self.unpack(target)

    def unpack(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the arrays as views of `buffer`, a copy of the packed bytes.

        The last array has as many rows as its capacity.
        """
        return {name: self._view(buffer, name) for name in self._layout}

    def _view(self, buffer: Tensor, name: str) -> Tensor:
        offset, shape, dtype = self._layout[name]
        rows = self._capacity if name == self._last else shape[0]
        num_bytes = rows * int(np.prod(shape[1:])) * dtype.itemsize
        return buffer[offset : offset + num_bytes].view(_TYPES[dtype]).view(rows, *shape[1:])
