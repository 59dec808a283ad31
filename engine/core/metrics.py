"""Figures about the engine: frozen snapshots that any thread may read."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

EngineState = Literal["ready", "stalled", "dead"]


class ColdStart:
    """Seconds that each phase of the start took, until the first request could be served."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count seconds under another phase, for phases that ran at the same time."""
        self.add(source, -seconds)
        self.add(target, seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model as it was loaded.

    sha, pipeline_tag  from the hub; None for a local model
    vocab_size         number of its token ids, which are below it
    weight_bytes       memory of its parameters and buffers
    quantization       method by which its weights are quantised, if they are
    unused_bytes       memory that a GPU's allocator holds beyond what is in use, after loading
    """

    model_id: str
    sha: str | None
    pipeline_tag: str | None
    dtype: str
    device: str
    vocab_size: int
    weight_bytes: int
    quantization: str | None
    unused_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """Counts from the scheduler after a step. Steps, preemptions and prefix tokens are totals
    since the start.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_prefix_hit_tokens: int = 0
    num_prefix_lookup_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Figures of one collected step.

    num_admitted  sequences that the step took from the queue
    num_prefills  sequences that computed more than one token
    num_decodes   sequences that computed one token
    forward_s     seconds from the launch to the result, including the wait for the step before
    emit_s        seconds that the host spent on the step's tokens
    """

    num_admitted: int
    num_prefills: int
    num_decodes: int
    num_tokens: int
    forward_s: float
    emit_s: float
    num_running: int
    num_waiting: int
    failed: bool


@dataclass(frozen=True, slots=True)
class EngineStatus:
    state: EngineState
    reason: str | None
    figures: EngineFigures

    @property
    def healthy(self) -> bool:
        return self.state == "ready"
