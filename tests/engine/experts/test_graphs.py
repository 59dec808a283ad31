"""Steps of mixtures of experts are captured as graphs, whatever experts their tokens choose."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import pytest

from engine.core.config import EngineConfig
from engine.engine import Engine
from engine.loading.loader import LoadedModel
from engine.step.graphs import Graph
from kernels import fused_sampling
from kernels.ops import TRITON
from tests.engine.driving import check_greedy, greedy, run
from tests.engine.models import FAMILIES, MIXTURES, prepared, reference
from tests.engine.recording import Recording, capture, recorded, recorded_kernel

T = TypeVar("T")
PROMPTS = [list(b"once upon a time"), list(b"a")]
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def recorded_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("greedy", "sample"):
        monkeypatch.setattr(fused_sampling, name, recorded_kernel(getattr(fused_sampling, name)))


def options(name: str, num_experts: int = 8) -> dict[str, Any]:
    """Return the options of a model of one layer, which is a mixture of so many experts."""
    count = next((c for c in _COUNTS if c in FAMILIES[name][1]), "num_local_experts")
    mixed = {"first_k_dense_replace": 0} if name == "deepseek_v3" else {}
    return {"num_hidden_layers": 1, count: num_experts, **mixed}


@cache
def mixture(name: str, num_experts: int = 8) -> LoadedModel:
    """Return a model of one layer on the Triton kernels, each of them one operation."""
    return prepared(name, recorded(TRITON), **options(name, num_experts))


def step_recordings(loaded: LoadedModel) -> list[Recording]:
    """Return the recordings of the smallest decode step: its forward and its sampling."""
    recordings = []

    def remember(work: Callable[[], T]) -> tuple[Graph, T]:
        recording, result = capture(work)  # raises where it would wait for the device
        recordings.append(recording)
        return recording, result

    config = EngineConfig(max_sequences=4, max_batch_tokens=64, num_blocks=64)
    assert Engine(loaded, config, capture=remember).capture_next_graph()
    return recordings


@pytest.mark.parametrize("name", MIXTURES)
def test_a_decode_step_takes_four_launches_for_experts_and_never_waits(name: str) -> None:
    """Routing, two products of which the first is gated too, and the sum."""
    names = [call.name for call in step_recordings(mixture(name))[0].launches]
    for kernel, count in {"route": 1, "grouped_linear": 2, "combine": 1}.items():
        assert names.count(f"{kernel}_triton") == count


def test_the_number_of_launches_does_not_grow_with_the_number_of_experts() -> None:
    few, many = (step_recordings(mixture("mixtral", count))[0] for count in (8, 32))
    assert len(few.launches) == len(many.launches)


@pytest.mark.parametrize("name", MIXTURES)
def test_replayed_steps_give_the_models_own_tokens(name: str) -> None:
    """Each replay routes other tokens to other experts than the step that was captured."""
    config = EngineConfig(max_sequences=8, max_batch_tokens=64, num_blocks=64)
    requests = [greedy(prompt, 3) for prompt in PROMPTS]
    engine = Engine(mixture(name), config, capture=capture)
    replayed = run(engine, [(2 * i, request) for i, request in enumerate(requests)])
    for request in requests:
        check_greedy(reference(name, **options(name)), replayed, request)
