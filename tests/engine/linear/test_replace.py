"""Linears of a model are replaced in place, and every kind of linear can be replaced."""

import torch
from torch import nn

from engine.linear.gemv import GemvLinear
from engine.linear.int8 import Int8Linear
from engine.linear.merged import merge
from engine.linear.packed import PackedLinear
from engine.linear.replace import Linear, replace_linears
from kernels.gemv import gemv_torch


def test_every_kind_of_linear_has_the_attributes_of_one() -> None:
    plain = nn.Linear(4, 3)
    int8 = Int8Linear(torch.ones(3, 4, dtype=torch.int8), torch.ones(3), None)
    linears = [
        plain,
        int8,
        PackedLinear(plain),
        GemvLinear(plain, gemv_torch, frozenset()),
        *merge([nn.Linear(4, 3), nn.Linear(4, 2)]).values(),
    ]
    assert all(isinstance(linear, Linear) for linear in linears)
    assert not isinstance(nn.LayerNorm(4), Linear)


def test_a_shared_linear_gets_one_replacement() -> None:
    shared = nn.Linear(4, 4)
    first, second = nn.Sequential(shared), nn.Sequential(shared)
    replace_linears(nn.Sequential(first, second), lambda _: nn.Linear(4, 4))
    assert first[0] is second[0] is not shared


def test_a_linear_without_a_replacement_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    kept, relu, replaced = model
    replacement = nn.Linear(3, 2)
    replace_linears(model, {replaced: replacement}.get)
    assert list(model) == [kept, relu, replacement]
