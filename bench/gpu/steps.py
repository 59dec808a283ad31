"""Time the steps of a model as the engine runs them, without a scheduler.

The runner, its graphs, the paged cache and the sampler are the engine's. The sequences are made
up: their tokens count as computed, and the cache holds noise, which takes as long.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bench.gpu.device import Timer
from engine.attention.kv_cache import AttentionCall
from engine.attention.plan import GraphShape
from engine.core.config import BLOCK_SIZE, EngineConfig
from engine.core.request import Request, SamplingParams, StoppingParams
from engine.core.scheduler import Batch, ScheduledSequence
from engine.core.sequence import Sequence
from engine.device.device import make_device
from engine.device.stream import Pending, make_stream
from engine.loading.loader import LoadedModel
from engine.loading.sizing import Limits
from engine.sampling.sampler import SamplingKind
from engine.step.builder import HostStep
from engine.step.captures import Captures
from engine.step.graphs import Capture, Graph
from engine.step.result import StepResult
from engine.step.runner import build_runner

_GREEDY = SamplingKind(plain=True, logprobs=False, raw_logprobs=False, num_top=0)


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """The time of a step.

    on_device  seconds of a step, with several queued one behind the other
    wall       seconds of a step that the host builds and launches while the previous one runs
    fits       the KV cache had enough blocks; otherwise sequences share blocks, at random
    in_graph   the forward and the sampling were replayed from graphs
    """

    on_device: float
    wall: float
    fits: bool
    in_graph: bool = False


@dataclass(frozen=True, slots=True)
class Launched:
    """Seconds that the host takes to launch a step, and seconds that the step takes the device."""

    host: float
    on_device: float


@dataclass(frozen=True, slots=True)
class CapturedShape:
    """What it took to run a step of this shape once and to capture it.

    num_bytes  that the device has less afterwards
    """

    shape: GraphShape
    seconds: float
    num_bytes: int


class Steps:
    """Owns a runner, with the model's KV cache and graphs, until it is closed."""

    def __init__(self, loaded: LoadedModel, limits: Limits, capture: Capture | None):
        device = loaded.model.device
        self.captures = capture is not None
        self.num_graphs = 0
        self._captured: set[GraphShape | None] = set()  # shapes with both graphs
        self._limits = limits
        self._timer = Timer(device)
        self._stream = make_stream(device)
        self._builder, self._runner = build_runner(
            loaded,
            limits,
            self._stream,
            capture and self._counted(capture),
            EngineConfig().max_top_tokens,
            EngineConfig().watermark,
            Captures(make_device(device)),
        )
        fill_cache(loaded.calls)
        self._rng = np.random.default_rng(0)

    def close(self) -> None:
        self._stream.close()

    def decode(self, batch: int, context: int, count: int) -> StepSeconds:
        """Time decode steps of `batch` sequences of about `context` tokens."""
        sequences, fits = self._sequences(batch, context, context + count + 1)
        start, num_graphs = context - 1, self.num_graphs
        for reset in (True, False):  # one that runs and is captured, and the first replayed
            self._launch(_batch(sequences, start, 1, reset)).result()
        step = self._builder.build(_batch(sequences, start, 1))
        if self.num_graphs == num_graphs + 2:
            self._captured.add(step.graph)
        wall = self._wall_seconds(lambda i: _batch(sequences, start + i, 1), count)
        in_graph = step.graph in self._captured
        return StepSeconds(self._device_seconds(step, count), wall, fits, in_graph)

    def prefill(self, batch: int, length: int, before: int, count: int) -> StepSeconds:
        """Time `length` tokens of each of `batch` prompts, after `before` cached ones."""
        sequences, fits = self._sequences(batch, before + length, before + length)
        self._launch(_batch(sequences, before, length, reset=True)).result()
        wall = self._wall_seconds(lambda _: _batch(sequences, before, length), count)
        step = self._builder.build(_batch(sequences, before, length))
        return StepSeconds(self._device_seconds(step, count), wall, fits)

    def mixed(
        self, num_tokens: int, decodes: int, context: int, count: int
    ) -> tuple[Launched, Launched | None]:
        """Time a step with a prompt beside decodes: launched kernel by kernel, and from graphs.

        The second is None where steps are not captured.
        """
        sequences, _ = self._sequences(decodes + 1, max(context, num_tokens), context + 1)
        entries = [_entry(sequence, context - 1, 1) for sequence in sequences[:-1]]
        batch = Batch([*entries, _entry(sequences[-1], 0, num_tokens)])
        self._launch(replace(batch, reset=sequences)).result()
        shapes, self._builder.graph_shapes = self._builder.graph_shapes, ()
        try:
            eager = self._launched(batch, count)
        finally:
            self._builder.graph_shapes = shapes
        return eager, self._launched(batch, count) if self.captures else None

    def _launched(self, batch: Batch, count: int) -> Launched:
        for _ in range(2):  # one that is captured if it can be, and the first replayed
            self._launch(batch).result()
        seconds = []
        for _ in range(count):
            step = self._builder.build(batch)
            started = time.perf_counter()
            pending = self._runner.launch(step)
            seconds.append(time.perf_counter() - started)
            pending.result()
        on_device = self._device_seconds(self._builder.build(batch), count)
        return Launched(statistics.median(seconds), on_device)

    def capture_all(self) -> Iterator[CapturedShape]:
        """Capture the greedy steps of each shape, in the engine's order."""
        for shape in reversed(self._builder.graph_shapes):
            free = _free_memory()
            started = time.perf_counter()
            self._runner.launch(self._builder.empty(shape, _GREEDY)).result()
            seconds = time.perf_counter() - started
            yield CapturedShape(shape, seconds, free - _free_memory())

    def _counted(self, capture: Capture) -> Capture:
        def record(work: Callable[[], Any]) -> tuple[Graph, Any]:
            captured = capture(work)
            self.num_graphs += 1
            return captured

        return record

    def _launch(self, batch: Batch) -> Pending[StepResult]:
        return self._runner.launch(self._builder.build(batch))

    def _wall_seconds(self, make_batch: Callable[[int], Batch], count: int) -> float:
        """Time steps that are launched one ahead, as the engine does."""
        pending = self._launch(make_batch(0))
        started = time.perf_counter()
        for i in range(1, count + 1):
            following = self._launch(make_batch(i))
            pending.result()
            pending = following
        pending.result()
        return (time.perf_counter() - started) / (count + 1)

    def _device_seconds(self, step: HostStep, count: int) -> float:
        return self._timer.launched(lambda: self._runner.launch(step), count)

    def _sequences(
        self, batch: int, num_known: int, num_tokens: int
    ) -> tuple[list[Sequence], bool]:
        """Make sequences in slots from 0 on, with shuffled blocks; return also whether they fit."""
        width, num_blocks = -(-num_tokens // BLOCK_SIZE), self._limits.num_blocks
        fits = batch * width <= num_blocks
        if fits:
            blocks = self._rng.permutation(num_blocks)[: batch * width]
        else:
            blocks = self._rng.integers(num_blocks, size=batch * width)
        sequences = []
        for slot, table in enumerate(blocks.reshape(batch, width).tolist()):
            prompt = self._rng.integers(256, size=num_known).tolist()
            stopping = StoppingParams(num_tokens, ignore_eos=True)
            sequence = Sequence(Request(str(slot), prompt, SamplingParams(), stopping))
            sequence.slot, sequence.block_table = slot, table
            sequences.append(sequence)
        return sequences, fits


def _free_memory() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def _entry(sequence: Sequence, start: int, length: int) -> ScheduledSequence:
    return ScheduledSequence(sequence, sequence.slot, start, length, True, 0)


def _batch(sequences: list[Sequence], start: int, length: int, reset: bool = False) -> Batch:
    return Batch(
        scheduled=[_entry(sequence, start, length) for sequence in sequences],
        reset=list(sequences) if reset else [],
    )


def fill_cache(calls: list[AttentionCall]) -> None:
    """Fill the KV cache with noise: unwritten memory may hold NaN, and zeros take less power."""
    for call in calls:
        for cache in call.module.paged_attention._calls:  # type: ignore[union-attr]
            if cache.writes and cache.key.dtype.itemsize > 1:
                cache.key.normal_()
                cache.value.normal_()
