"""Measures the memory that a device has available, and the memory that some work takes."""

from collections.abc import Callable
from typing import Protocol

import psutil
import torch

_HOST_MAX_BYTES = 8 << 30
_HOST_SHARE = 0.3


class DeviceMemory(Protocol):
    def available(self) -> int:
        """Return the number of bytes that may still be allocated."""

    def peak_of(self, work: Callable[[], object]) -> int:
        """Return the most bytes that `work` allocates beyond what is allocated already."""


class HostMemory:
    """Memory of the host, which other programs use too: only a part of what is free is taken."""

    def available(self) -> int:
        free = psutil.virtual_memory().available
        return min(int(free * _HOST_SHARE), _HOST_MAX_BYTES)

    def peak_of(self, work: Callable[[], object]) -> int:
        del work  # far more than a step needs is left free
        return 0


class CudaMemory:
    """Memory of a GPU, of which `fraction` may be used."""

    def __init__(self, device: torch.device, fraction: float):
        self._device = device
        self._fraction = fraction

    def available(self) -> int:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return int(free - (1 - self._fraction) * total)

    def peak_of(self, work: Callable[[], object]) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before


def device_memory(device: torch.device, fraction: float) -> DeviceMemory:
    """Return the memory of the device; of a GPU's, `fraction` may be used."""
    return CudaMemory(device, fraction) if device.type == "cuda" else HostMemory()
