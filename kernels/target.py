"""The GPU that kernels are tuned for: the one that is there, or one that is assumed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import triton


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU, as far as tuning depends on it.

    capability    compute capability; 90 is 9.0
    shared_bytes  most shared memory of a block
    num_sms       number of streaming multiprocessors
    """

    capability: int
    shared_bytes: int
    num_sms: int


_assumed_target: Target | None = None


def target_of(device: torch.device) -> Target:
    """Return the GPU that kernels on `device` are tuned for."""
    return _assumed_target or _query(device)


@contextmanager
def using_target(target: Target) -> Iterator[None]:
    """Make `target_of` return `target` for every device, in all threads, for the time being."""
    global _assumed_target
    before, _assumed_target = _assumed_target, target
    try:
        yield
    finally:
        _assumed_target = before


@cache
def _query(device: torch.device) -> Target:
    if device.type != "cuda":  # the kernel is interpreted
        return Target(80, 163 << 10, 2)
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    return Target(
        major * 10 + minor, properties["max_shared_mem"], properties["multiprocessor_count"]
    )
