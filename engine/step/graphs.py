"""Steps captured once and replayed: a launch for the whole of it, not one for each kernel.

A CUDA graph repeats the same kernels on the same addresses. So each shape of steps has a
buffer of its own that a step's arrays are copied into, and whatever varies between steps
of a shape is found there: nothing of it is a number in Python.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.attention.plan import GraphShape
from engine.step.builder import HostStep, StepInputs

_DECODES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16))
"""Rows of the captured decode steps: a step of more than 8 fills at least half of its graph, one
of more than 64 at least four fifths.
"""
_PREFILLS = (16, 32, 64, 128, 256)
"""Rows of those with chunks of prompts: short prompts, and what a cached prefix leaves. With
more tokens the device takes as long as the host does for launching kernel by kernel.
"""


def sizes_for(max_sequences: int) -> tuple[int, ...]:
    """Rows of the graphs that decode steps of so many sequences can need."""
    return tuple(
        size for size, less in zip(_DECODES, (0, *_DECODES), strict=False) if less < max_sequences
    )


def shapes_for(max_sequences: int, max_batch_tokens: int) -> tuple[GraphShape, ...]:
    """Of the graphs that steps can need, the least needed ones first."""
    prefills = (GraphShape(rows, prefills=True) for rows in _PREFILLS if rows <= max_batch_tokens)
    return (*prefills, *map(GraphShape, sizes_for(max_sequences)))


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
        try:
            # The stream is named because a capture that fails leaves its own in place. Other
            # threads may use the device meanwhile; only this one's calls are recorded.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                result = work()
        except RuntimeError:
            self._pool = torch.cuda.graph_pool_handle()  # the old one may be left recording
            raise
        return graph, result


@dataclass(slots=True)
class _Captured:
    """Of one shape: the buffer, the step's tensors as views of it, and what runs on them."""

    buffer: Tensor
    inputs: StepInputs
    parts: dict[Hashable, tuple[Graph, Any]] = field(default_factory=dict)


class StepGraphs:
    """The captured parts of steps, by shape. A part is captured when it is first needed."""

    def __init__(self, capture: Capture, device: torch.device):
        self._capture = capture
        self._device = device
        self._shapes: dict[GraphShape, _Captured] = {}

    def load(self, step: HostStep, shape: GraphShape) -> StepInputs:
        """Copy the step's arrays to where the graphs of this shape read them."""
        if shape not in self._shapes:
            buffer = torch.zeros(step.arrays.max_bytes, dtype=torch.uint8, device=self._device)
            self._shapes[shape] = _Captured(buffer, step.inputs(buffer))
        step.arrays.copy_to(self._shapes[shape].buffer)
        return self._shapes[shape].inputs

    def has(self, shape: GraphShape, part: Hashable) -> bool:
        return shape in self._shapes and part in self._shapes[shape].parts

    def capture(self, shape: GraphShape, part: Hashable, work: Callable[[], Any]) -> None:
        """Record `work`, which must have run before. Raises RuntimeError where it cannot be."""
        self._shapes[shape].parts[part] = self._capture(work)

    def result(self, shape: GraphShape, part: Hashable) -> Any:
        """Where a replay puts its result."""
        return self._shapes[shape].parts[part][1]

    def replay(self, shape: GraphShape, part: Hashable) -> Any:
        graph, result = self._shapes[shape].parts[part]
        graph.replay()
        return result
