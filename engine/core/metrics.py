"""What the engine says about itself: frozen snapshots that any thread may read."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

EngineState = Literal["ready", "stalled", "dead"]


class ColdStart:
    """Where the seconds went until the first request could be served, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def move(self, seconds: float, source: str, target: str) -> None:
        """Of what ran side by side, each second counts once."""
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
    """The model as it was loaded. `sha` and `pipeline_tag` are the hub's, if it is from there.

    `weight_bytes` are what its parameters and buffers take; `quantization` is their method.
    """

    model_id: str
    sha: str | None
    pipeline_tag: str | None
    dtype: str
    device: str
    weight_bytes: int
    quantization: str | None


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """Counts read from the scheduler at the end of a step; totals since the start."""

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
    """One step, when it has been looked at.

    num_admitted  sequences that came from the queue with it
    num_prefills  sequences that computed more than one token; `num_decodes` one
    forward_s     from its launch to its result, a wait behind the step before included
    emit_s        of the host, on its tokens
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
