"""Rotary tables give each step the bits that the model's own rotary modules would."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Phi3Config, PreTrainedModel

from engine.core.config import EngineConfig
from engine.engine import Engine
from engine.fusion import rotary_tables
from engine.fusion.rotary_tables import RotaryTables
from engine.loading.rotary import freeze_rotary
from tests.engine.driving import check_greedy, greedy, make_engine, run
from tests.engine.models import MAX_POSITIONS, build, family, prepared, reference

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 6,
    "long_factor": [3.0] * 6,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: partial(reference, name) for name in ("llama", "gemma3", "gpt_oss", "phi3")},
    "llama3": lambda: build(LlamaConfig, rope_parameters=LLAMA3),
    "dynamic": lambda: build(LlamaConfig, rope_parameters=DYNAMIC),
    "longrope": lambda: build(Phi3Config, rope_parameters=LONGROPE),
}


def rotaries(model: PreTrainedModel) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(getattr(m, "rope_type", None), str | dict)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_looked_up_tables_are_the_modules_own_to_the_bit(name: str, dtype: torch.dtype) -> None:
    model = deepcopy(MODELS[name]())
    nn.Module.to(model, dtype)
    freeze_rotary(model, MAX_POSITIONS)
    tables = RotaryTables(model, MAX_POSITIONS)
    x = torch.zeros(1, 5, 48, dtype=dtype)
    for module in rotaries(model):
        types = module.rope_type if isinstance(module.rope_type, dict) else [None]
        for layer_type in types:
            keywords: dict[str, Any] = {"layer_type": layer_type} if layer_type else {}
            for length in (1, 5, MAX_POSITIONS):
                positions = torch.randperm(MAX_POSITIONS)[None, :length]
                own = module(x, positions, **keywords)
                with tables:
                    assert "forward" in module.__dict__
                    looked_up = module(x, position_ids=positions, **keywords)
                assert all(torch.equal(a, b) for a, b in zip(own, looked_up, strict=True))


@contextmanager
def unable_to_compute(model: PreTrainedModel) -> Iterator[None]:
    """Have the model's rotary modules compute NaN."""
    buffers = [buffer for module in rotaries(model) for buffer in module.buffers()]
    values = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        buffer.fill_(torch.nan)
    try:
        yield
    finally:
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "phi3"])
def test_a_step_looks_its_rotary_tables_up(name: str) -> None:
    loaded = family(name)
    engine = make_engine(loaded)
    requests = [greedy(b"once upon a time there was", 8), greedy(b"a", 8)]
    with unable_to_compute(loaded.model):
        answers = run(engine, [(i, request) for i, request in enumerate(requests)])
    for request in requests:
        check_greedy(reference(name), answers, request)


def test_outside_of_a_step_the_model_is_as_it_was() -> None:
    model = reference("llama")
    tables, (module,) = RotaryTables(model, 32), rotaries(model)
    x = torch.zeros(1, 1, 48)
    with pytest.raises(IndexError), tables:
        module(x, torch.tensor([[40]]))  # there is no such row
    assert "forward" not in module.__dict__
    assert module(x, torch.tensor([[40]]))[0].shape[:2] == (1, 1)


def test_other_calls_reach_the_module_itself() -> None:
    model = reference("llama")
    tables, (module,) = RotaryTables(model, 32), rotaries(model)
    x, positions = torch.zeros(1, 1, 48), torch.tensor([[3]])
    with tables:
        assert module(x.bfloat16(), positions)[0].dtype is torch.bfloat16


def test_tables_that_would_be_too_large_are_not_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = reference("llama")
    columns = model.config.head_dim
    monkeypatch.setattr(rotary_tables, "_MAX_BYTES", 32 * 2 * columns * 4)
    (module,) = rotaries(model)
    with caplog.at_level(logging.INFO), RotaryTables(model, 33):
        assert "forward" not in module.__dict__
    assert caplog.messages == []
    with caplog.at_level(logging.INFO), RotaryTables(model, 32):
        assert "forward" in module.__dict__
    assert caplog.messages == ["rotary tables of 32 positions take 0.0 MiB"]


def test_a_module_whose_rows_depend_on_each_other_is_left_alone() -> None:
    model = reference("llama", num_hidden_layers=1)
    (module,) = rotaries(model)
    own = module.forward
    module.forward = lambda x, ids: tuple(t + ids.max() for t in own(x, ids))
    try:
        with RotaryTables(model, 32):
            assert module.forward(torch.zeros(1, 1), torch.tensor([[1]]))[0].min() > 0.5
    finally:
        del module.forward


def test_models_without_positions_of_this_kind_are_served_as_before() -> None:
    config = EngineConfig(max_sequences=8, max_batch_tokens=64, num_blocks=64)
    engine = Engine(prepared("gpt2"), config)
    request = greedy(b"once", 3)
    check_greedy(reference("gpt2"), run(engine, [(0, request)]), request)
