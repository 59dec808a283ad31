"""Measures the memory that captured steps keep, before the cache takes what is left."""

import gc
from collections.abc import Callable, Sequence
from itertools import product

from engine.attention.plan import GraphShape
from engine.device.memory import DeviceMemory
from engine.sampling.sampler import SamplingKind
from engine.step.builder import StepBuilder
from engine.step.runner import ModelRunner

Build = Callable[[], tuple[StepBuilder, ModelRunner]]


def graph_bytes(build: Build, memory: DeviceMemory) -> int:
    """Return the bytes that the graphs of all shapes will keep, each with every kind of sampling.

    Some graphs are captured with what `build` returns, and given up again. The difference is what
    they keep: their pool, their logits, and what the driver keeps of each. Code that was loaded
    for them stays, so it is part of what the device has no longer available.

    Raises torch.OutOfMemoryError.
    """
    available, more = _capture_some(build, memory)
    gc.collect()  # an engine refers to itself
    return max(memory.available() - available, 0) + more


def _capture_some(build: Build, memory: DeviceMemory) -> tuple[int, int]:
    """Return the bytes available beside some captured graphs, and the bytes of all others.

    The graphs share a pool, in which the largest ones determine how much memory there is. Each
    other one adds what the driver keeps: as much as the first of them.
    """
    builder, runner = build()
    kinds = runner.sampler.usual_kinds + runner.sampler.rare_kinds
    largest, others = _largest_and_others(builder.graph_shapes)
    for shape, kind in product(largest, kinds):
        capture_ahead(builder, runner, shape, kind)
    available = memory.available()
    if not others:
        return available, 0
    for kind in kinds:
        capture_ahead(builder, runner, others[-1], kind)
    each = max(available - memory.available(), 0)
    return available, each * len(others)


def _largest_and_others(
    shapes: Sequence[GraphShape],
) -> tuple[list[GraphShape], list[GraphShape]]:
    by_kind = [[s for s in shapes if s.prefills is prefills] for prefills in (False, True)]
    largest = [kind[-1] for kind in by_kind if kind]
    return largest, [shape for shape in shapes if shape not in largest]


def capture_ahead(
    builder: StepBuilder, runner: ModelRunner, shape: GraphShape, kind: SamplingKind
) -> bool:
    """Capture the graphs of one shape and kind of sampling, by a step of padding; return whether
    one was missing. Raises what the step raises.
    """
    step = builder.empty(shape, kind)
    is_missing = runner.needs_capture(step)
    if is_missing:
        runner.launch(step).result()
    return is_missing
