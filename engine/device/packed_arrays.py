"""Many small arrays in one buffer, so that they cross to the device in one copy."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

View = Callable[[str], Tensor]
"""An array that was packed, by its name, wherever the buffer went."""
_ALIGNMENT = 16  # bytes: what a vector load needs
_TYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}


class PackedArrays:
    """int64 and int32 arrays by name, packed in their order.

    buffer     [used bytes] uint8, on the host
    max_bytes  of any step of the same layout: the last array may have up to `capacity` rows
    """

    def __init__(self, arrays: dict[str, np.ndarray], capacity: int | None = None):
        self._arrays = arrays
        self._last = next(reversed(arrays))
        self._capacity = capacity or len(arrays[self._last])
        self._offsets: dict[str, int] = {}
        end = 0
        for name, array in arrays.items():
            self._offsets[name] = offset = (end + _ALIGNMENT - 1) & -_ALIGNMENT
            end = offset + array.nbytes
        buffer = np.empty(end, dtype=np.uint8)
        for name, offset in self._offsets.items():
            array = np.ascontiguousarray(arrays[name])
            buffer[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        self.buffer = torch.from_numpy(buffer)

    def copy_to(self, target: Tensor) -> None:
        """Fill the beginning of `target` [>= used bytes] uint8, without waiting for it.

        From pinned memory: a copy from any other waits until the device is done.
        """
        source = self.buffer.pin_memory() if target.is_cuda else self.buffer
        target[: len(source)].copy_(source, non_blocking=True)

    def on(self, device: torch.device) -> Tensor:
        """A copy of the buffer on a device; on the CPU the buffer itself."""
        if device.type == "cpu":
            return self.buffer
        target = torch.empty(len(self.buffer), dtype=torch.uint8, device=device)
        self.copy_to(target)
        return target

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    @property
    def max_bytes(self) -> int:
        return self._offsets[self._last] + self._num_bytes(self._last)

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """The array of this name in a copy of the buffer."""
        array, offset = self._arrays[name], self._offsets[name]
        part = buffer[offset : offset + self._num_bytes(name)]
        return part.view(_TYPES[array.dtype]).view(self._rows(name), *array.shape[1:])

    def _rows(self, name: str) -> int:
        return self._capacity if name == self._last else len(self._arrays[name])

    def _num_bytes(self, name: str) -> int:
        array = self._arrays[name]
        return self._rows(name) * int(np.prod(array.shape[1:])) * array.itemsize
