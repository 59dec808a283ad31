"""Timing work on a device, and what the device can do at most."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured in the same run as whatever is held against them.

    bytes_per_s  reading memory, far more of it than any cache has
    flops_per_s  multiplying large matrices
    launch_s     an empty kernel after another
    """

    bytes_per_s: float
    flops_per_s: float
    launch_s: float

    def bound_s(self, num_bytes: float, flops: float) -> float:
        """No implementation of one operation is faster."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


class Timer:
    """Seconds that calls take on a device, the host's part left out where it can run ahead."""

    def __init__(self, device: torch.device):
        self._device = device

    def seconds(self, work: Callable[[], object], min_s: float = 0.05) -> float:
        """Of one call: the median over batches of calls that last `min_s` all together."""
        work()
        once = max(self._batch(work, 1), 1e-7)
        calls = max(1, min(1000, int(min_s / 5 / once)))
        return statistics.median(self._batch(work, calls) for _ in range(5)) / calls

    def _batch(self, work: Callable[[], object], calls: int) -> float:
        if self._device.type != "cuda":
            started = time.perf_counter()
            for _ in range(calls):
                work()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    timer = Timer(device)
    one = torch.ones(1, device=device)
    return Ceilings(
        bytes_per_s=_bandwidth(timer, device),
        flops_per_s=_gemm_rate(timer, device, dtype),
        launch_s=timer.seconds(lambda: one.add_(1)),
    )


def _bandwidth(timer: Timer, device: torch.device) -> float:
    """Of reading or of copying, whichever is more."""
    num_bytes = (4 << 30) if device.type == "cuda" else (64 << 20)
    words = torch.ones(num_bytes // 4, dtype=torch.int32, device=device)
    copied = torch.empty_like(words)
    read, copy = timer.seconds(words.max), timer.seconds(lambda: copied.copy_(words))
    return max(num_bytes / read, 2 * num_bytes / copy)


def _gemm_rate(timer: Timer, device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / timer.seconds(lambda: a @ b)
