"""The experts of a mixture, beside their reference and beside what float64 gives."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.grouped_gemm import (
    FEW,
    TILINGS,
    GateForm,
    Routing,
    Tiling,
    combine_torch,
    combine_triton,
    gated,
    grouped_linear_torch,
    grouped_linear_triton,
    most_blocks,
    route_torch,
    route_triton,
    sample_routings_triton,
    tiling_for,
)
from tests.kernels.rounding import DEVICE, ulps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SILU = GateForm("halves", "silu")
CLAMPED = GateForm("interleaved", "silu", limit=1.0, slope=1.702, shift=1.0)
LAYOUTS = list(product((False, True), (False, True), (None, SILU, CLAMPED)))
"""Whether weights are transposed, whether there is a bias, and the form of the gate."""


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with DEVICE:
        torch.manual_seed(0)
        yield


def choices(num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    return torch.rand(num_tokens, num_experts).topk(top_k).indices


def blocks_of(routing: Routing) -> list[tuple[int, list[int]]]:
    """Return each block's expert and pairs."""
    entries = routing.blocks[: int(routing.num_blocks)].tolist()
    return [(expert, routing.order[first:end].tolist()) for expert, first, end in entries]


# -- which expert computes which pairs -----------------------------------------------------


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: f"{tiling.rows} rows")
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(2, 4, 2), (5, 128, 8), (33, 8, 2), (200, 5, 3), (700, 40, 4)],
)
def test_pairs_are_sorted_by_expert_and_cut_into_blocks(
    num_tokens: int, num_experts: int, top_k: int, tiling: Tiling
) -> None:
    experts = choices(num_tokens, num_experts, top_k)
    routing = route_triton(experts, num_experts, tiling)
    blocks = blocks_of(routing)
    assert blocks == blocks_of(route_torch(experts, num_experts, tiling))
    assert sorted(pair for _, pairs in blocks for pair in pairs) == list(range(experts.numel()))
    for expert, pairs in blocks:
        assert 0 < len(pairs) <= tiling.rows
        assert all(experts.flatten()[pair] == expert for pair in pairs)


@pytest.mark.parametrize("expert", [0, 3, 6])
def test_all_tokens_may_choose_the_same_expert(expert: int) -> None:
    experts = torch.full((300, 1), expert)
    blocks = blocks_of(route_triton(experts, 7, FEW))
    assert [e for e, _ in blocks] == [expert] * 19
    assert [pair for _, pairs in blocks for pair in pairs] == list(range(300))


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 2), (64, 8), (256, 8)])
def test_no_choice_needs_more_blocks_than_are_launched(num_experts: int, top_k: int) -> None:
    for num_tokens, tiling in product((1, 2, 7, 16, 50), TILINGS):
        most = most_blocks(num_tokens * top_k, num_experts, tiling.rows)
        same = torch.arange(top_k).expand(num_tokens, top_k)
        spread = torch.arange(num_tokens * top_k).view(num_tokens, top_k) % num_experts
        for experts in (same, spread, choices(num_tokens, num_experts, top_k)):
            assert int(route_torch(experts, num_experts, tiling).num_blocks) <= most


def test_an_expert_that_does_not_exist_computes_nothing() -> None:
    experts = torch.tensor([[4, 1], [0, 4], [2, 1], [4, 4]])
    for route in (route_torch, route_triton):
        assert {pair for _, pairs in blocks_of(route(experts, 4)) for pair in pairs} == {1, 2, 4, 5}


def test_tiles_are_taller_the_more_rows_an_expert_has() -> None:
    assert [tiling_for(rows * 8, 8).rows for rows in (1, 16, 17, 64, 65, 500)] == [
        16, 16, 64, 64, 128, 128,
    ]  # fmt: skip


# -- the products --------------------------------------------------------------------------


def problem(
    dtype: torch.dtype,
    num_tokens: int,
    inputs: int,
    outputs: int,
    transposed: bool = False,
    with_bias: bool = False,
    num_experts: int = 4,
    top_k: int = 2,
) -> dict[str, Any]:
    shape = (num_experts, inputs, outputs) if transposed else (num_experts, outputs, inputs)
    return {
        "x": torch.randn(num_tokens, inputs).to(dtype),
        "weight": (torch.randn(shape) / inputs**0.5).to(dtype),
        "bias": torch.randn(num_experts, outputs).to(dtype) if with_bias else None,
        "transposed": transposed,
        "experts": choices(num_tokens, num_experts, top_k),
    }


def exact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: Tensor,
    transposed: bool,
) -> Tensor:
    """Return every pair's product in float64."""
    pairs = experts.flatten()
    rows = x.repeat_interleave(len(pairs) // len(x), dim=0).double()
    matrices = weight.double() if transposed else weight.double().transpose(1, 2)
    products = torch.bmm(rows[:, None], matrices[pairs])[:, 0]
    return products if bias is None else products + bias.double()[pairs]


def check(result: Tensor, expected: Tensor) -> None:
    """Float32 adds in another order; 16 bits are one rounding away from what float32 adds."""
    eps = torch.finfo(result.dtype).eps
    allowed = 1e-5 if result.dtype == torch.float32 else eps / 2 * expected.abs() + 1e-5
    assert ((result.double() - expected).abs() <= allowed).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 19])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 64), (80, 48), (200, 150)])
def test_each_row_is_multiplied_by_its_experts_matrix(
    inputs: int, outputs: int, num_tokens: int, dtype: torch.dtype
) -> None:
    for transposed, with_bias in product((False, True), repeat=2):
        data = problem(dtype, num_tokens, inputs, outputs, transposed, with_bias)
        expected, experts = exact(**data), data.pop("experts")
        check(grouped_linear_triton(routing=route_triton(experts, 4), **data), expected)
        check(grouped_linear_torch(routing=route_torch(experts, 4), **data), expected)


@pytest.mark.slow
@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: f"{tiling.rows} rows")
@pytest.mark.parametrize(("transposed", "with_bias", "form"), LAYOUTS, ids=str)
def test_every_tiling_and_layout_gives_the_same(
    tiling: Tiling, transposed: bool, with_bias: bool, form: GateForm | None
) -> None:
    data = problem(torch.float32, 40, 72, 140, transposed, with_bias)
    expected, experts = exact(**data), data.pop("experts")
    if form:
        expected = gated(expected, form)
    result = grouped_linear_triton(routing=route_triton(experts, 4, tiling), form=form, **data)
    check(result, expected)


def test_each_pair_may_have_a_row_of_its_own() -> None:
    data = problem(torch.float32, 9, 64, 48)
    expected, experts = exact(**data), data.pop("experts")
    data["x"] = data["x"].repeat_interleave(2, dim=0)
    check(grouped_linear_triton(routing=route_triton(experts, 4), **data), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [SILU, CLAMPED, GateForm("halves", "relu2", limit=2.0)])
def test_a_gate_is_rounded_where_the_model_rounds_it(form: GateForm, dtype: torch.dtype) -> None:
    """Identity matrices let the gate see the same numbers in both."""
    x = (torch.randn(64, 64) * 3).to(dtype)
    eye = torch.eye(64, dtype=dtype)[None]
    routing = route_triton(torch.zeros(64, 1, dtype=torch.int64), 1)
    result = grouped_linear_triton(x, eye, None, routing, form=form)
    distance = ulps(result, gated(x, form))
    assert (distance == 0).float().mean() > 0.99  # each library has its own exp
    assert distance.max() <= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights_dtype", DTYPES, ids=str)
def test_a_tokens_results_are_summed_by_their_weights(
    dtype: torch.dtype, weights_dtype: torch.dtype
) -> None:
    x, weights = torch.randn(15, 1100).to(dtype), torch.rand(5, 3).to(weights_dtype)
    routing = route_triton(choices(5, 6, 3), 6)
    result = combine_triton(x, weights, routing, 6)
    assert result.dtype == dtype
    reference = combine_torch(x, weights, routing, 6)
    assert torch.allclose(result, reference, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_results_of_experts_that_do_not_exist_are_never_read() -> None:
    x, weights = torch.full((4, 8), torch.nan), torch.ones(2, 2)
    x[0] = 1.0
    routing = route_triton(torch.tensor([[3, 9], [9, 9]]), 9)
    for combine in (combine_torch, combine_triton):
        assert combine(x, weights, routing, 9).tolist() == [[1.0] * 8, [0.0] * 8]


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 33])
def test_a_row_does_not_depend_on_the_rows_beside_it(num_tokens: int) -> None:
    """Within one tiling it is bit-equal, alone or in company."""
    data = problem(torch.bfloat16, num_tokens, 128, 64)
    experts = data.pop("experts")
    del data["transposed"]
    together = grouped_linear_triton(routing=route_triton(experts, 4, FEW), **data)
    for token in range(num_tokens):
        data_alone = {**data, "x": data["x"][token : token + 1]}
        alone = grouped_linear_triton(
            routing=route_triton(experts[token : token + 1], 4), **data_alone
        )
        assert torch.equal(alone, together[2 * token : 2 * token + 2])


def test_the_samples_have_every_tiling_and_the_single_token() -> None:
    samples = sample_routings_triton(4, DEVICE)
    assert {routing.tiling for routing in samples} == set(TILINGS)
    assert [routing.is_single for routing in samples] == [True, False, False, False]
