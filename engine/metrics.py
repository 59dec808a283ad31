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
class EngineStatus:
    state: EngineState
    reason: str | None
    figures: EngineFigures

    @property
    def healthy(self) -> bool:
        return self.state == "ready"
