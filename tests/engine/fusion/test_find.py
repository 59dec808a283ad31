"""What is fused in a model, found by structure; and what is left alone."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CohereConfig, PhiConfig, PreTrainedConfig

from engine.fusion.find import fuse, trace_forward
from engine.fusion.merged_linear import MemberLinear, merge, unmerge
from engine.loading.probe import difference, discover, reference_logits
from kernels.ops import TORCH, Ops
from tests.engine.driving import check_greedy, greedy, make_engine, run
from tests.engine.models import FAMILIES, FUSED, build, prepared, reference

PER_LAYER = {  # of 4 layers: GEMMs of one input, norms besides the last, activations, rotations
    "llama": (2, 2, 1, 1),
    "qwen3": (2, 4, 1, 1),
    "gemma2": (2, 4, 1, 1),
    "phi3": (0, 2, 1, 1),
    "olmo2": (2, 4, 1, 1),
    "gemma3": (2, 6, 1, 1),
    "gpt_oss": (1, 2, 0, 1),
    "starcoder2": (1, 2, 1, 1),
}
NAMES = ("GEMMs of one input", "norms", "activations", "rotations")


def fusions_of(
    config_class: type[PreTrainedConfig], options: dict[str, Any], ops: Ops = TORCH
) -> dict[str, int]:
    model = build(config_class, **options)
    calls = discover(model)
    with trace_forward(model, [call.module for call in calls]) as trace:
        expected = reference_logits(model)
    problem = lambda: difference(model, calls, expected, ops)  # noqa: E731
    fused = fuse(model, trace, ops, problem)
    assert problem() is None
    return {fusion.name: fusion.count for fusion in fused}


@pytest.mark.parametrize("name", PER_LAYER)
def test_what_is_found_in_a_family(name: str) -> None:
    gemms, norms, activations, rotations = (4 * n for n in PER_LAYER[name])
    expected = dict(zip(NAMES, (gemms, norms + 1, activations, rotations), strict=True))
    assert fusions_of(*FAMILIES[name]) == {k: v for k, v in expected.items() if v}


def test_neighbours_that_form_pairs_are_recognised() -> None:
    assert fusions_of(CohereConfig, {})["rotations"] == 4


def test_a_rotation_of_a_part_is_left_to_the_model() -> None:
    """Phi turns slices and joins them again: what comes after the rotation is not attention."""
    assert fusions_of(PhiConfig, {})["GEMMs of one input"] == 4


@pytest.mark.parametrize("op", ["add_norm", "act_mul", "rotary_store_kv"])
def test_a_fusion_that_changes_the_answers_is_undone(
    op: str, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(*args: Any) -> Any:
        result = getattr(TORCH, op)(*args)
        return result * 1.5 if isinstance(result, Tensor) else (result[0] * 1.5, result[1])

    with caplog.at_level(logging.WARNING):
        found = fusions_of(*FAMILIES["llama"], replace(TORCH, **{op: wrong}))
    assert len(found) == 3
    assert "not fused" in caplog.text


def test_other_models_of_the_same_class_are_untouched() -> None:
    before = build(*FAMILIES["llama"][:1])
    prepared("llama", FUSED)
    after = build(*FAMILIES["llama"][:1])
    for module in (*before.modules(), *after.modules()):
        assert "forward" not in vars(module)
        assert not isinstance(module, MemberLinear)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_where_nothing_is_launched_nothing_is_fused(name: str) -> None:
    loaded = prepared(name, TORCH)
    assert not any("forward" in vars(module) for module in loaded.model.modules())
    request = greedy(b"once upon", 6)
    check_greedy(reference(name), run(make_engine(loaded), [(0, request)]), request)


# -- linears of one input ------------------------------------------------------------------


class Parent(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.a = nn.Linear(6, 4, bias=bias)
        self.b = nn.Linear(6, 10, bias=bias)


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def parent(request: pytest.FixtureRequest) -> Parent:
    torch.manual_seed(0)
    return Parent(request.param).requires_grad_(False)


def test_merged_linears_answer_as_before_in_any_order(parent: Parent) -> None:
    x, y = torch.randn(2, 3, 6)
    expected = [parent.a(x), parent.b(x), parent.a(y), parent.b(y)]
    merge(parent, {"a": parent.a, "b": parent.b})
    for answers in (
        [parent.a(x), parent.b(x), parent.a(y), parent.b(y)],
        [*reversed([parent.b(x), parent.a(x)]), *reversed([parent.b(y), parent.a(y)])],
    ):
        torch.testing.assert_close(answers, expected)
    torch.testing.assert_close(
        [parent.a(x), parent.a(x), parent.a(y)], [*expected[:1] * 2, expected[2]]
    )


def test_merged_linears_show_their_weights_and_come_apart_again(parent: Parent) -> None:
    before = {name: p.clone() for name, p in parent.named_parameters()}
    members = {"a": parent.a, "b": parent.b}
    merge(parent, members)
    assert torch.equal(parent.a.weight, before["a.weight"])
    assert torch.equal(parent.b.weight, before["b.weight"])
    unmerge(parent, members)
    after = dict(parent.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_was_computed_for_an_input_is_not_kept(parent: Parent) -> None:
    merge(parent, {"a": parent.a, "b": parent.b})
    x = torch.randn(3, 6)
    parent.a(x), parent.b(x)
    x += 1  # an input that changed in place is a new one
    torch.testing.assert_close(parent.a(x), nn.functional.linear(x, parent.a.weight, parent.a.bias))
