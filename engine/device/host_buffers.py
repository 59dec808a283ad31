"""Memory of the host that steps copy from and to, kept from step to step.

A device copies to and from page-locked memory without making the host wait. Getting such memory
takes calls that a step would otherwise repeat for each of its copies.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_SMALLEST = 4096
"""Bytes. Sizes are powers of two from here on, so that few buffers serve all steps."""


class HostBuffer(NamedTuple):
    """The same memory twice: as `tensor` [size] uint8, and as `array` for the host's own use."""

    tensor: Tensor
    array: np.ndarray


class HostBuffers:
    """Buffers that are free for the next step; page-locked if they are for a GPU."""

    def __init__(self, device: torch.device):
        self._pinned = device.type == "cuda"
        self._free: dict[int, list[HostBuffer]] = {}

    def take(self, num_bytes: int) -> HostBuffer:
        """Return a buffer of at least this size, which nobody else has."""
        size = max(_SMALLEST, 1 << (num_bytes - 1).bit_length())
        free = self._free.get(size)
        if free:
            return free.pop()
        tensor = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        return HostBuffer(tensor, tensor.numpy())

    def give_back(self, buffer: HostBuffer) -> None:
        self._free.setdefault(len(buffer.array), []).append(buffer)


class Staging:
    """The buffers of one step.

    They are released when the step's results were read: only then has the device surely copied
    what is in them. Those of a step that fails are left to torch, which waits for their copies.
    """

    def __init__(self, buffers: HostBuffers):
        self._buffers = buffers
        self._taken: list[HostBuffer] = []

    def take(self, num_bytes: int) -> HostBuffer:
        buffer = self._buffers.take(num_bytes)
        self._taken.append(buffer)
        return buffer

    def release(self) -> None:
        """Give all buffers back, which nothing may read or copy to any more."""
        while self._taken:
            self._buffers.give_back(self._taken.pop())
