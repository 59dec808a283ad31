"""How much memory the device has for us, and how much something takes."""

from collections.abc import Callable
from typing import Protocol

import psutil
import torch

_HOST_MAX_BYTES = 8 << 30
_HOST_SHARE = 0.3


class DeviceMemory(Protocol):
    def available(self) -> int:
        """Bytes that we may still take."""

    def peak_of(self, work: Callable[[], object]) -> int:
        """Bytes that `work` takes at its worst moment, beyond what is taken already."""


class HostMemory:
    """The machine is not ours alone: we take a part of what is free."""

    def available(self) -> int:
        free = psutil.virtual_memory().available
        return min(int(free * _HOST_SHARE), _HOST_MAX_BYTES)

    def peak_of(self, work: Callable[[], object]) -> int:
        del work  # what we leave free is far more
        return 0


class CudaMemory:
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
    """`fraction` of a GPU's memory is ours to use."""
    return CudaMemory(device, fraction) if device.type == "cuda" else HostMemory()
