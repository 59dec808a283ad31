"""Measures the memory that a device has available, and the memory that some work takes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import psutil
import torch

_HOST_MAX_BYTES = 8 << 30
_HOST_SHARE = 0.3
_HOST_MAX_SHARE = 0.8
"""The rest is for what steps need, whatever size of cache was asked for."""
_CGROUPS = Path("/sys/fs/cgroup")


class DeviceMemory(Protocol):
    def available(self) -> int:
        """Return the number of bytes that may still be allocated."""

    def peak_of(self, work: Callable[[], object]) -> int:
        """Return the most bytes that `work` allocates beyond what is allocated already."""


class HostMemory:
    """Memory of the host, which other programs use too: only a part of what is free is taken, or
    as many bytes as were `asked` for, as far as they are free.
    """

    def __init__(self, asked: int | None = None):
        self._asked = asked

    def available(self) -> int:
        free = free_host_memory()
        if self._asked is None:
            return min(int(free * _HOST_SHARE), _HOST_MAX_BYTES)
        return min(self._asked, int(free * _HOST_MAX_SHARE))

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


def unused_bytes(device: torch.device) -> int:
    """Return the bytes that torch holds on a GPU, cannot give back, and does not use: holes between
    tensors. 0 on a CPU.
    """
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def device_memory(
    device: torch.device, fraction: float, host_bytes: int | None = None
) -> DeviceMemory:
    """Return the memory of the device: `fraction` of a GPU's may be used, or `host_bytes` of the
    host's (None: a part of what is free).
    """
    return CudaMemory(device, fraction) if device.type == "cuda" else HostMemory(host_bytes)


def free_host_memory(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the bytes that this process may still use, within the limits of its container.

    The kernel kills a process that exceeds the limit of one of its control groups. A container
    often sees its own group as the root of `cgroups`, whatever path `own` names.
    """
    free: int = psutil.virtual_memory().available
    for folder, limit, usage, reclaimable in _groups(cgroups, own):
        try:
            most = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group here, or "max": no limit
            continue
        # Pages of files that were read count as used, and are given up when memory is needed.
        free = min(free, most - used + int(stat.get(reclaimable, 0)))
    return max(free, 0)


def _groups(cgroups: Path, own: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yield each control group that limits this process, from its own up to the root: its folder,
    and the names of limit, usage and reclaimable pages, in version 2 or 1.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield (folder, *names)
            if folder == root:
                break
