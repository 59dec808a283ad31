"""What the engine says about itself: frozen snapshots that any thread may read."""

from dataclasses import dataclass
from typing import Literal

EngineState = Literal["ready", "stalled", "dead"]


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
