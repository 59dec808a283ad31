"""Steps captured once as CUDA graphs and replayed: one launch per step, not one per kernel.

A CUDA graph repeats the same kernels on the same addresses. So each shape of steps has its own
buffer, into which a step's arrays are copied. Whatever varies between steps of a shape is read
from that buffer; none of it is a number in Python.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from engine.attention.plan import AttentionPlanner, GraphShape
from engine.sampling.sampler import SampledTokens, SamplingKind
from engine.step.builder import HostStep, StepInputs

T = TypeVar("T")

_DECODES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16))
"""Rows of the captured decode steps.

A step of more than 8 rows fills at least half of its graph, one of more than 64 at least four
fifths.
"""
_PREFILLS = (16, 32, 64, 128, 256)
"""Rows of the captured steps with chunks of prompts.

They serve short prompts, and what a cached prefix leaves of a long one. With more tokens the
device takes as long as the host does for launching kernel by kernel.
"""


def sizes_for(max_sequences: int) -> tuple[int, ...]:
    """Rows of the graphs that decode steps of up to `max_sequences` sequences can need."""
    return tuple(
        size for size, less in zip(_DECODES, (0, *_DECODES), strict=False) if less < max_sequences
    )


def shapes_for(max_sequences: int, max_batch_tokens: int) -> tuple[GraphShape, ...]:
    """Shapes of all graphs that steps can need, the least needed ones first."""
    prefills = (GraphShape(rows, prefills=True) for rows in _PREFILLS if rows <= max_batch_tokens)
    return (*prefills, *map(GraphShape, sizes_for(max_sequences)))


class Graph(Protocol):
    """A recording of launched work. `torch.cuda.CUDAGraph` is one."""

    def replay(self) -> None: ...


class Capture(Protocol):
    """Records what `work` launches, without running it.

    Returns the recording, and the result of `work`, which every replay overwrites.
    """

    def __call__(self, work: Callable[[], T], /) -> tuple[Graph, T]: ...


class CudaCapture:
    """Captures CUDA graphs, which share one memory pool as they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], T]) -> tuple[Graph, T]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # The stream is set explicitly because a failed capture leaves its own stream current.
            # Other threads may use the device meanwhile; only this thread's calls are recorded.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                result = work()
        except RuntimeError:
            self._pool = torch.cuda.graph_pool_handle()  # the old one may be left recording
            raise
        return graph, result


@dataclass(frozen=True, slots=True)
class Captured(Generic[T]):
    """A captured part of a step, and the place where each replay puts its result."""

    graph: Graph
    result: T

    def replay(self) -> T:
        self.graph.replay()
        return self.result


@dataclass(slots=True)
class ShapeGraphs:
    """The graphs of one shape, with the buffer and the inputs that they read.

    Sampling is captured apart from the forward, because there are many kinds of it.
    """

    buffer: Tensor
    inputs: StepInputs
    forward: Captured[Tensor] | None = None
    sampling: dict[SamplingKind, Captured[SampledTokens]] = field(default_factory=dict)


class StepGraphs:
    """The captured graphs of all shapes. Each is captured when it is first needed."""

    def __init__(self, capture: Capture, planner: AttentionPlanner, device: torch.device):
        self._capture = capture
        self._planner = planner
        self._device = device
        self._shapes: dict[GraphShape, ShapeGraphs] = {}

    def load(self, step: HostStep, shape: GraphShape) -> ShapeGraphs:
        """Copy the step's arrays to where the graphs of this shape read them."""
        if shape not in self._shapes:
            buffer = torch.zeros(step.arrays.max_bytes, dtype=torch.uint8, device=self._device)
            inputs = step.inputs(step.arrays.unpack(buffer), self._planner)
            self._shapes[shape] = ShapeGraphs(buffer, inputs)
        graphs = self._shapes[shape]
        step.arrays.copy_to(graphs.buffer)
        return graphs

    def get(self, shape: GraphShape) -> ShapeGraphs | None:
        return self._shapes.get(shape)

    def capture(self, work: Callable[[], T]) -> Captured[T]:
        """Record `work`, which must have run before. Raises RuntimeError if that is impossible."""
        return Captured(*self._capture(work))
