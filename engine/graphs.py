"""Steps captured once and replayed: a launch for the whole of it, not one for each kernel.

A CUDA graph repeats the same kernels on the same addresses. So each size has a buffer of
its own that a step's arrays are copied into, and whatever varies between steps of a size
is found there: nothing of it is a number in Python.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.step_inputs import HostStep, StepInputs

_SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16))
"""Rows of the captured steps: a step of more than 8 fills at least half of its graph, one of
more than 64 at least four fifths.
"""


def sizes_for(max_sequences: int) -> tuple[int, ...]:
    """Those that a step of so many sequences can need."""
    return tuple(
        size for size, less in zip(_SIZES, (0, *_SIZES), strict=False) if less < max_sequences
    )


class Graph(Protocol):
    """What `torch.cuda.CUDAGraph` is to us."""

    def replay(self) -> None: ...


Capture = Callable[[Callable[[], Any]], tuple[Graph, Any]]
"""Records what a function does without doing it; gives the recording and the result's place."""


class CudaCapture:
    """All graphs share one memory pool: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Any]) -> tuple[Graph, Any]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile; only this one's calls are recorded.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        return graph, result


@dataclass(slots=True)
class _Size:
    """One size: its buffer, the step's tensors as views of it, and what was captured on them."""

    buffer: Tensor
    inputs: StepInputs
    captured: dict[Hashable, tuple[Graph, Any]] = field(default_factory=dict)


class StepGraphs:
    """The captured parts of steps, by size. A part is captured when it is first needed."""

    def __init__(self, capture: Capture, device: torch.device):
        self._capture = capture
        self._device = device
        self._sizes: dict[int, _Size] = {}

    def load(self, step: HostStep, size: int) -> StepInputs:
        """Copy the step's arrays to where the graphs of this size read them."""
        if size not in self._sizes:
            buffer = torch.zeros(step.arrays.max_bytes, dtype=torch.uint8, device=self._device)
            self._sizes[size] = _Size(buffer, step.inputs(buffer))
        step.arrays.copy_to(self._sizes[size].buffer)
        return self._sizes[size].inputs

    def has(self, size: int, part: Hashable) -> bool:
        return size in self._sizes and part in self._sizes[size].captured

    def capture(self, size: int, part: Hashable, work: Callable[[], Any]) -> None:
        """Record `work`, which must have run before. Raises RuntimeError where it cannot be."""
        self._sizes[size].captured[part] = self._capture(work)

    def result(self, size: int, part: Hashable) -> Any:
        """Where a replay puts its result."""
        return self._sizes[size].captured[part][1]

    def replay(self, size: int, part: Hashable) -> Any:
        graph, result = self._sizes[size].captured[part]
        graph.replay()
        return result
