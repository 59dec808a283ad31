"""The experts of transformers' models, computed by our function and by their eager one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.experts.interface import (
    EXPERTS_NAME,
    ExpertsLayer,
    restore_experts,
    use_experts,
)
from kernels.grouped_gemm import FEW, TILINGS, GateForm
from kernels.ops import TORCH, TRITON, Ops
from tests.engine.models import FAMILIES, MIXTURES, build, prepared

OPS = [pytest.param(TORCH, id="torch"), pytest.param(TRITON, id="triton")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SILU = GateForm("halves", "silu")


def mixture(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    config_class, family_options = FAMILIES[name]
    options = {"num_hidden_layers": 2, **family_options, **options}
    model = build(config_class, **options).requires_grad_(False)
    return model.to(dtype)  # type: ignore[arg-type]


def experts_of(model: PreTrainedModel) -> Any:
    return next(module for module in model.modules() if hasattr(module, "is_transposed"))


def eagerly(experts: nn.Module, *inputs: Tensor) -> Tensor:
    config: Any = experts.config
    name = config._experts_implementation
    config._experts_implementation_internal = "eager"
    result: Tensor = experts(*inputs)
    config._experts_implementation_internal = name
    return result


def inputs_of(experts: Any, num_tokens: int, top_k: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    hidden = experts.down_proj.shape[2 if experts.is_transposed else 1]
    scores = torch.rand(num_tokens, experts.num_experts)
    weights, chosen = scores.topk(top_k)
    return torch.randn(num_tokens, hidden).to(dtype), chosen, weights.to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_experts_give_what_they_give_eagerly(name: str, num_tokens: int, ops: Ops[Any]) -> None:
    model = mixture(name)
    assert use_experts(model, ops)
    experts = experts_of(model)
    inputs = inputs_of(experts, num_tokens, 2, torch.float32)
    expected = eagerly(experts, *inputs)
    assert experts.config._experts_implementation == EXPERTS_NAME
    assert torch.allclose(experts(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_in_16_bits_they_are_no_farther_from_the_true_numbers(
    name: str, dtype: torch.dtype, ops: Ops[Any]
) -> None:
    """Eager experts round in more places: a sum of 16 bits after each expert."""
    model = mixture(name, dtype)
    use_experts(model, ops)
    experts = experts_of(model)
    inputs = inputs_of(experts, 40, 2, dtype)
    result, eager = experts(*inputs).double(), eagerly(experts, *inputs).double()
    restore_experts({experts: "eager"})
    exact = experts.double()(inputs[0].double(), inputs[1], inputs[2].double())
    assert (result - exact).square().mean() <= 1.1 * (eager - exact).square().mean()


@pytest.mark.parametrize("name", MIXTURES)
def test_gates_are_recognised_by_what_they_compute(name: str) -> None:
    model = mixture(name)
    use_experts(model, TORCH)
    layer: ExpertsLayer = experts_of(model).experts_layer
    clamped = GateForm("interleaved", "silu", limit=7.0, slope=1.702, shift=1.0)
    assert layer.form == (clamped if name == "gpt_oss" else SILU)


@pytest.mark.parametrize("ops", OPS)
def test_a_gate_that_no_kernel_knows_is_computed_by_the_module(
    ops: Ops[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture("mixtral")
    experts = experts_of(model)

    def gate(_: Any, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cos(first) * second

    use_experts(model, ops)
    inputs = inputs_of(experts, 5, 2, torch.float32)
    usual = experts(*inputs)
    monkeypatch.setattr(type(experts), "_apply_gate", gate)
    use_experts(model, ops)
    assert experts.experts_layer.form is None
    experts.config._experts_implementation_internal = "grouped_mm"
    expected = experts(*inputs)
    experts.config._experts_implementation_internal = EXPERTS_NAME
    assert torch.allclose(experts(*inputs), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(usual, expected, rtol=0.1)


def test_both_products_run_in_every_tiling_at_load_so_that_no_step_compiles() -> None:
    seen = set()

    def remember(*args: Any) -> Tensor:
        weight, routing = args[1], args[3]
        seen.add((routing.tiling, routing.is_single, weight.shape))
        return TRITON.grouped_linear(*args)

    model = mixture("mixtral")
    changes: dict[str, Any] = {"grouped_linear": remember}
    use_experts(model, replace(TRITON, **changes))
    experts = experts_of(model)
    shapes = experts.gate_up_proj.shape, experts.down_proj.shape
    kinds = [(FEW, True), *((tiling, False) for tiling in TILINGS)]
    assert seen == {(*kind, shape) for kind in kinds for shape in shapes}


def test_experts_that_share_a_configuration_with_quantised_ones_keep_their_own() -> None:
    model = mixture("mixtral")
    last: Any = [module for module in model.modules() if hasattr(module, "is_transposed")][-1]
    last.gate_up_proj = nn.Parameter(last.gate_up_proj.to(torch.float8_e4m3fn), False)
    before = model.config._experts_implementation
    assert use_experts(model, TORCH) == {}
    assert model.config._experts_implementation == before


def test_replacing_experts_can_be_undone() -> None:
    model = mixture("mixtral")
    before = model.config._experts_implementation
    restore_experts(use_experts(model, TORCH))
    assert model.config._experts_implementation == before
    assert not hasattr(experts_of(model), "experts_layer")


def test_a_model_without_experts_is_left_alone() -> None:
    assert use_experts(mixture("llama"), TORCH) == {}


def test_on_a_cpu_experts_are_computed_as_transformers_does() -> None:
    """Its grouped products are the fastest there."""
    served = prepared("mixtral", num_hidden_layers=1)
    assert served.model.config._experts_implementation == "grouped_mm"


def test_experts_that_change_the_logits_are_undone(caplog: pytest.LogCaptureFixture) -> None:
    def wrong(*args: Any) -> Tensor:
        return TORCH.combine(*args) * 1.5

    served = prepared("mixtral", replace(TORCH, fuses=True, combine=wrong), num_hidden_layers=1)
    assert served.model.config._experts_implementation == "grouped_mm"
    assert "mixtures of experts are not fused" in caplog.text


@pytest.mark.parametrize("ops", OPS)
def test_experts_of_16_bits_take_tokens_in_float32(ops: Ops[Any]) -> None:
    model = mixture("mixtral", torch.bfloat16)
    use_experts(model, ops)
    experts = experts_of(model)
    x, chosen, weights = inputs_of(experts, 3, 2, torch.float32)
    result = experts(x, chosen, weights)
    assert result.dtype == torch.float32
    assert torch.equal(result, experts(x.bfloat16(), chosen, weights).float())
