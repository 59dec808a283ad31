"""Measures how long work takes on a GPU, at load, to choose between ways to do it."""

import time
from collections.abc import Callable

import torch

Timer = Callable[[Callable[[], object]], float | None]
"""Returns the seconds that some work takes on the device, or None if they cannot be told."""

_ROUNDS = 3
_CYCLES_PER_S = 2e9
"""The approximate rate of `torch.cuda._sleep`, which counts cycles of the GPU's clock."""
_LONGEST_SLEEP_S = 0.2


class CudaTimer:
    """Times work as it runs in a graph: its kernels follow each other without the host.

    They are queued while the device sleeps, which records nothing: a capture of work that cannot
    be captured would spoil the process. Nothing that the work reads is in the L2 cache before.
    """

    def __init__(self, device: torch.device):
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._evicting = torch.empty(2 * cache_bytes, dtype=torch.uint8, device=device)

    def __call__(self, work: Callable[[], object]) -> float | None:
        """Return the least time of several runs. None if the work itself waits for the device."""
        work()  # compiles what it has to
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        sleep_s = 2 * (time.perf_counter() - started) + 1e-4
        seconds: list[float] = []
        while len(seconds) < _ROUNDS:
            taken = self._run(work, sleep_s)
            if taken is not None:
                seconds.append(taken)
            elif sleep_s > _LONGEST_SLEEP_S:
                return None
            else:
                sleep_s *= 2
        return min(seconds)

    def _run(self, work: Callable[[], object], sleep_s: float) -> float | None:
        """Return the seconds, or None if the sleep ended before all was queued."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._evicting.zero_()
        torch.cuda._sleep(int(sleep_s * _CYCLES_PER_S))
        start.record()
        work()
        end.record()
        was_asleep = not start.query()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 if was_asleep else None


def make_timer(device: torch.device) -> Timer | None:
    """Return what times work on the device; None on a CPU, where nothing is chosen by time."""
    return CudaTimer(device) if device.type == "cuda" else None
