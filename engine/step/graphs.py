"""Steps captured once as CUDA graphs and replayed: one launch per step, not one per kernel.

A CUDA graph repeats the same kernels on the same addresses. So each shape of steps has its own
buffer, into which a step's arrays are copied. Whatever varies between steps of a shape is read
from that buffer; none of it is a number in Python.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from engine.attention.plan import AttentionPlanner, GraphShape
from engine.device.host_buffers import Staging
from engine.sampling.sampler import SamplingKind
from engine.step.builder import HostStep, StepInputs
from engine.step.result import PackedTokens

T = TypeVar("T")

_DECODES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16))
"""Rows of the captured decode steps.

A step of more than 8 rows fills at least half of its graph, one of more than 64 at least four
fifths. Beyond 256 sizes go up by an eighth at most.
"""
_PREFILLS = (16, 32, 64, 128, 256, 384, *range(512, 2049, 256))
"""Tokens of the captured steps with chunks of prompts.

A step of more than 256 fills at least two thirds of its graph, and chunks of long prompts fill it
whole. Beyond 2048 tokens the device takes longer than the host, which launches kernel by kernel, on
all but the smallest models.
"""


def sizes_for(max_sequences: int) -> tuple[int, ...]:
    """Rows of the graphs that decode steps of up to `max_sequences` sequences can need."""
    sizes = [
        size for size, less in zip(_DECODES, (0, *_DECODES), strict=False) if less < max_sequences
    ]
    while sizes[-1] < max_sequences:
        sizes.append(sizes[-1] + sizes[-1] // 256 * 32)
    return tuple(sizes)


def shapes_for(max_sequences: int, max_batch_tokens: int) -> tuple[GraphShape, ...]:
    """Shapes of all graphs that steps can need, the least needed ones first."""
    prefills = (
        GraphShape(tokens, min(tokens, max_sequences), prefills=True)
        for tokens in _PREFILLS
        if tokens <= max_batch_tokens
    )
    return (*prefills, *(GraphShape(rows, rows) for rows in sizes_for(max_sequences)))


class Graph(Protocol):
    """A recording of launched work. `torch.cuda.CUDAGraph` is one."""

    def replay(self) -> None: ...


class Capture(Protocol):
    """Records what `work` launches, without running it.

    Returns the recording, and the result of `work`, which every replay overwrites.
    """

    def __call__(self, work: Callable[[], T], /) -> tuple[Graph, T]: ...


class CudaCapture:
    """Captures CUDA graphs, which share one memory pool as they never run at the same time.

    torch's own context manager empties the caches of device and host memory before each capture:
    then the steps between two captures allocate everything anew. Here that is done once.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # the default stream cannot be captured
        self._has_captured = False

    def __call__(self, work: Callable[[], T]) -> tuple[Graph, T]:
        torch.cuda.synchronize()
        if not self._has_captured:
            torch.cuda.empty_cache()  # so that the pool can have what other steps have freed
            self._has_captured = True
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Other threads may use the device meanwhile; only this thread's calls are recorded.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException as error:
                with suppress(RuntimeError):  # what was raised first says more
                    graph.capture_end()
                self._leave_pool(error)
                raise
            try:
                graph.capture_end()
            except RuntimeError as error:
                self._leave_pool(error)
                raise
        return graph, result

    def _leave_pool(self, error: BaseException) -> None:
        """Use another pool for the next capture, unless memory ran out: the allocator may take
        the pool of any other failed capture for one that is still recorded.
        """
        if not isinstance(error, torch.OutOfMemoryError):
            self._pool = torch.cuda.graph_pool_handle()


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
    sampling: dict[SamplingKind, Captured[PackedTokens]] = field(default_factory=dict)


class StepGraphs:
    """The captured graphs of all shapes. Each is captured when it is first needed.

    All of them leave their logits in the same memory: the sampling of a step always comes before
    the forward of the next one.
    """

    def __init__(
        self, capture: Capture, planner: AttentionPlanner, device: torch.device, max_rows: int
    ):
        """`max_rows` is the number of logits of the largest shape."""
        self._capture = capture
        self._planner = planner
        self._device = device
        self._max_rows = max_rows
        self._logits: Tensor | None = None
        self._shapes: dict[GraphShape, ShapeGraphs] = {}

    def load(self, step: HostStep, shape: GraphShape, staging: Staging) -> ShapeGraphs:
        """Copy the step's arrays to where the graphs of this shape read them."""
        if shape not in self._shapes:
            buffer = torch.zeros(step.arrays.max_bytes, dtype=torch.uint8, device=self._device)
            inputs = step.inputs(step.arrays.unpack(buffer), self._planner)
            self._shapes[shape] = ShapeGraphs(buffer, inputs)
        graphs = self._shapes[shape]
        step.arrays.copy_to(graphs.buffer, staging)
        return graphs

    def share(self, logits: Tensor) -> Tensor:
        """Copy logits [rows, vocab_size] to where all graphs leave theirs; return that part.

        The memory for them is allocated by the first call, which must not be captured.
        """
        if self._logits is None:
            self._logits = logits.new_empty(self._max_rows, logits.shape[1])
        return self._logits[: len(logits)].copy_(logits)

    def get(self, shape: GraphShape) -> ShapeGraphs | None:
        return self._shapes.get(shape)

    def capture(self, work: Callable[[], T]) -> Captured[T]:
        """Record `work`, which must have run before. Raises RuntimeError if that is impossible."""
        return Captured(*self._capture(work))
