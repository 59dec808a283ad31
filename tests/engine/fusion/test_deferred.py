"""A deferred operation is fused with the expected next one, and never changes a value."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.fusion.deferred import Activated, Deferred, Residual
from kernels.norm import NormForm
from kernels.ops import TORCH, Ops

FORM = NormForm(eps=1e-6)
generator = torch.Generator().manual_seed(0)
BASE, ADDEND, OTHER, WEIGHT = (torch.randn(1, 5, 8, generator=generator) for _ in range(4))

USES: dict[str, Callable[[Any], Any]] = {
    "function": lambda x: F.linear(x, WEIGHT[0]),
    "function of a list": lambda x: torch.cat([x, x], dim=-1),
    "method": lambda x: x.mean(-1),
    "view": lambda x: x.view(5, 8).transpose(0, 1),
    "subtraction": lambda x: x - OTHER,
    "reflected division": lambda x: 1 / x,
    "negation": lambda x: -x,
    "power": lambda x: x**2,
    "matrix product": lambda x: x @ WEIGHT[0].T,
    "indexing": lambda x: x[:, torch.tensor([0, 2])],
    "number": lambda x: x * 3.0 + 1,
    "broadcast sum": lambda x: x + OTHER[:, :1],
    "broadcast product": lambda x: OTHER[:, :, :1] * x,
    "other type": lambda x: x + OTHER.double(),
    "length": lambda x: torch.tensor(len(x)),
    "in place": lambda x: OTHER.clone().add_(x),
    "itself": lambda x: x + x,
    "shape": lambda x: torch.tensor([*x.shape, x.dtype.itemsize]),
}


def residual() -> Residual:
    return Residual(TORCH, BASE, ADDEND)


def activated() -> Activated:
    return Activated(TORCH, BASE, "silu", F.silu)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize(("make", "value"), [(residual, BASE + ADDEND), (activated, F.silu(BASE))])
def test_an_operation_that_is_not_fused_gets_the_tensor(
    make: Callable[[], Deferred], value: Tensor, use: Callable[[Any], Any]
) -> None:
    answer = use(make())
    if isinstance(answer, Deferred):
        answer = answer.materialize()
    assert torch.equal(answer, use(value))


def counting(name: str) -> tuple[Ops, list[int]]:
    calls: list[int] = []

    def kernel(*args: Any) -> Any:
        calls.append(1)
        return getattr(TORCH, name)(*args)

    changes: dict[str, Any] = {name: kernel}
    return replace(TORCH, **changes), calls


def test_the_addition_before_a_norm_is_done_by_the_norm() -> None:
    ops, calls = counting("add_norm")
    stream = Residual(ops, BASE) + ADDEND
    normed = stream.norm(WEIGHT[0, 0], None, FORM)
    assert len(calls) == 1
    assert torch.equal(stream.materialize(), BASE + ADDEND)
    assert torch.equal(normed, TORCH.norm(BASE + ADDEND, WEIGHT[0, 0], None, FORM))


def test_a_stream_whose_sum_was_computed_already_is_only_normalised() -> None:
    ops, calls = counting("add_norm")
    stream = OTHER + Residual(ops, BASE)
    total = stream.materialize()
    assert torch.equal(stream.norm(None, None, FORM), TORCH.norm(total, None, None, FORM))
    assert not calls


def test_only_the_last_addition_is_deferred() -> None:
    stream = Residual(TORCH, BASE) + ADDEND + OTHER
    assert torch.equal(stream.materialize(), BASE + ADDEND + OTHER)


@pytest.mark.parametrize("product", [lambda a, up: a * up, lambda a, up: up * a])
def test_the_activation_of_a_gate_is_done_by_the_multiplication(
    product: Callable[[Any, Tensor], Tensor],
) -> None:
    ops, calls = counting("act_mul")
    result = product(Activated(ops, BASE, "silu", F.silu), OTHER)
    assert len(calls) == 1
    assert torch.equal(result, F.silu(BASE) * OTHER)
