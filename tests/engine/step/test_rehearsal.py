"""Every kind of sampling is run once before the first request, and leaves nothing behind."""

import pytest

from engine.core.config import EngineConfig
from engine.engine import Engine
from kernels.ops import TRITON
from tests.engine.driving import check_greedy, greedy, make_engine, run
from tests.engine.models import family, prepared, reference


@pytest.mark.slow
@pytest.mark.parametrize("max_sequences", [1, 8])
def test_a_request_after_all_kinds_were_run_gets_the_models_own_tokens(max_sequences: int) -> None:
    loaded = prepared("llama", TRITON, num_hidden_layers=1)
    config = EngineConfig(max_sequences=max_sequences, max_batch_tokens=16, num_blocks=8)
    engine = Engine(loaded, config)
    engine.prepare_sampling()
    assert not engine.has_work
    request = greedy(b"once upon a time", 4)
    check_greedy(reference("llama", num_hidden_layers=1), run(engine, [(0, request)]), request)


def test_a_sampler_without_kernels_has_nothing_to_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(family("llama"))
    monkeypatch.setattr(engine.runner, "launch_forward", None)  # any step fails
    engine.prepare_sampling()
