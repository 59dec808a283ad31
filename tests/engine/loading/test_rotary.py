"""Rotary frequencies that depend on a length are fixed for one, and may be fixed for another."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from engine.loading.rotary import freeze_rotary
from tests.engine.fusion.test_rotary_tables import MODELS, rotaries


def tables(name: str, *lengths: int) -> list[torch.Tensor]:
    """Return cos of some positions after frequencies were fixed for each of these lengths."""
    model = deepcopy(MODELS[name]())
    for length in lengths:
        freeze_rotary(model, length)
    x, positions = torch.zeros(1, 5, 48), torch.arange(40)[None]
    return [
        module(x, positions, **({"layer_type": layer_type} if layer_type else {}))[0]
        for module in rotaries(model)
        for layer_type in _layer_types(module)
    ]


def _layer_types(module: nn.Module) -> list[str | None]:
    return list(module.rope_type) if isinstance(module.rope_type, dict) else [None]


@pytest.mark.parametrize("lengths", [(5000, 300), (300, 5000), (5000, 200), (200, 5000)])
@pytest.mark.parametrize("name", ["llama", "gemma3", "dynamic", "longrope", "llama3"])
def test_the_last_length_decides(name: str, lengths: tuple[int, int]) -> None:
    pairs = zip(tables(name, *lengths), tables(name, lengths[-1]), strict=True)
    assert all(torch.equal(again, once) for again, once in pairs)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_length_decides_at_all(name: str) -> None:
    pairs = zip(tables(name, 5000), tables(name, 200), strict=True)
    assert not any(torch.equal(long, short) for long, short in pairs)
