"""Time work on a device, and measure the device's ceilings.

A `Timer` uses CUDA events on CUDA and the clock elsewhere, so that every measurement can be
tested on a CPU.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.gpu.bounds import Rates
from engine.device.stream import Pending
from engine.step.graphs import CudaCapture

_ROUNDS = 5
_CALLS_PER_GRAPH = 64
_SLEEP_CYCLES_PER_S = 2e9
"""The approximate rate of `torch.cuda._sleep`, which counts cycles of the GPU's clock."""
_LONGEST_SLEEP_S = 1.0


class Timer:
    """Measures the seconds that a call takes on the device, without the host's launch time."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self._capture = CudaCapture() if self.on_cuda else None

    def of(self, *calls: Callable[[], object], min_s: float = 0.02) -> float:
        """Return the mean time of the calls, run one after the other as in a captured step.

        Pass several calls with different data to keep the data out of the device's cache.
        """
        for call in calls:
            call()
        once = max(self._elapsed(lambda: _run(calls)), 1e-7)
        rounds = max(1, min(int(min_s / once), _CALLS_PER_GRAPH // len(calls)))
        work = self._replayable(lambda: _run(calls * rounds))
        repeats = max(1, min(int(min_s / max(self._elapsed(work), 1e-7)), 1000))
        batches = [self._elapsed(lambda: _run([work] * repeats)) for _ in range(_ROUNDS)]
        return statistics.median(batches) / (repeats * rounds * len(calls))

    def launched(self, launch: Callable[[], Pending[object]], count: int) -> float:
        """Return the time of one launched step, queued with others while the device sleeps."""
        launch().result()
        started = time.perf_counter()
        pending = launch()
        to_launch_s = time.perf_counter() - started
        pending.result()
        if not self.on_cuda:
            started = time.perf_counter()
            _await([launch() for _ in range(count)])
            return (time.perf_counter() - started) / count
        sleep_s = min(2 * count * to_launch_s, _LONGEST_SLEEP_S)
        self._queued(launch, count, sleep_s)  # the first time allocates pinned memory
        return self._queued(launch, count, sleep_s)

    def _queued(self, launch: Callable[[], Pending[object]], count: int, sleep_s: float) -> float:
        torch.cuda._sleep(int(sleep_s * _SLEEP_CYCLES_PER_S))
        start, end = _events()
        start.record()
        launched = [launch() for _ in range(count)]
        end.record()
        _await(launched)
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    def _replayable(self, work: Callable[[], None]) -> Callable[[], object]:
        if self._capture is None:
            return work
        graph, _ = self._capture(work)
        return graph.replay

    def _elapsed(self, work: Callable[[], object]) -> float:
        if not self.on_cuda:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        start, end = _events()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _run(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _await(launched: list[Pending[object]]) -> None:
    for pending in launched:
        pending.result()


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device can do at most, measured in the same run as the figures compared with it.

    read_bytes_per_s  reading far more memory than any cache has
    copy_bytes_per_s  copying as much, counting both the reads and the writes
    flops_per_s       multiplying large matrices of random numbers
    kernel_s          time between the ends of trivial kernels in a graph
    launch_s          host time to launch a trivial kernel outside of a graph
    round_trip_s      time to launch a trivial kernel and wait for its result
    """

    read_bytes_per_s: float
    copy_bytes_per_s: float
    flops_per_s: float
    kernel_s: float
    launch_s: float
    round_trip_s: float

    @property
    def rates(self) -> Rates:
        """The rates for bounds: memory's is the better of reading and copying."""
        return Rates(max(self.read_bytes_per_s, self.copy_bytes_per_s), self.flops_per_s)

    def figures(self) -> dict[str, float]:
        return {
            "gb_per_s": self.rates.bytes_per_s / 1e9,
            "read_gb_per_s": self.read_bytes_per_s / 1e9,
            "copy_gb_per_s": self.copy_bytes_per_s / 1e9,
            "tflops": self.flops_per_s / 1e12,
            "kernel_us": self.kernel_s * 1e6,
            "launch_us": self.launch_s * 1e6,
            "round_trip_us": self.round_trip_s * 1e6,
        }


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, num_bytes: int, gemm_size: int
) -> Ceilings:
    timer = Timer(device)
    read_rate, copy_rate = _bandwidths(timer, device, num_bytes)
    one = torch.ones(1, device=device)
    return Ceilings(
        read_bytes_per_s=read_rate,
        copy_bytes_per_s=copy_rate,
        flops_per_s=_gemm_rate(timer, device, dtype, gemm_size),
        kernel_s=timer.of(lambda: one.add_(1)),
        launch_s=_host_seconds(timer, lambda: one.add_(1), 200),
        round_trip_s=_host_seconds(timer, lambda: one.add_(1).item(), 200),
    )


def _bandwidths(timer: Timer, device: torch.device, num_bytes: int) -> tuple[float, float]:
    """Return the bandwidth of the best of several ways to read, and of a copy."""
    words = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    read_s = min(timer.of(read) for read in (words.sum, words.amax, lambda: words.dot(words)))
    copied = torch.empty_like(words)
    return num_bytes / read_s, 2 * num_bytes / timer.of(lambda: copied.copy_(words))


def _gemm_rate(timer: Timer, device: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * size**3 / timer.of(lambda: torch.mm(a, b, out=product), min_s=0.1)


def _host_seconds(timer: Timer, work: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    _run([work] * count)
    seconds = time.perf_counter() - started
    if timer.on_cuda:
        torch.cuda.synchronize()
    return seconds / count
