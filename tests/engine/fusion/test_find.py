"""Fusions are found by a model's structure; modules that are not recognised stay unchanged."""

import logging
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor
from transformers import CohereConfig, PhiConfig, PreTrainedConfig

from engine.fusion.find import fuse, trace_forward
from engine.linear.merged import MergedLinear
from engine.loading.probe import discover, find_problem, reference_logits
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
MIXED = {"gpt_oss": {"mixtures of experts": 4}}


def fusions_of(
    config_class: type[PreTrainedConfig], options: dict[str, Any], ops: Ops = TORCH
) -> dict[str, int]:
    model = build(config_class, **options)
    calls = discover(model)
    with trace_forward(model, [call.module for call in calls]) as trace:
        expected = reference_logits(model)
    problem = lambda: find_problem(model, calls, expected, ops)  # noqa: E731
    fused = fuse(model, trace, ops, problem)
    assert problem() is None
    return {fusion.name: fusion.count for fusion in fused}


@pytest.mark.parametrize("name", PER_LAYER)
def test_the_expected_fusions_are_found_in_each_family(name: str) -> None:
    gemms, norms, activations, rotations = (4 * n for n in PER_LAYER[name])
    expected = dict(zip(NAMES, (gemms, norms + 1, activations, rotations), strict=True))
    found = {k: v for k, v in expected.items() if v} | MIXED.get(name, {})
    assert fusions_of(*FAMILIES[name]) == found


def test_rotations_of_interleaved_pairs_are_recognised() -> None:
    assert fusions_of(CohereConfig, {})["rotations"] == 4


def test_a_rotation_of_a_part_of_the_head_is_not_fused() -> None:
    """Phi rotates slices and joins them again, so the rotation is not followed by attention."""
    assert fusions_of(PhiConfig, {})["GEMMs of one input"] == 4


@pytest.mark.parametrize("op", ["add_norm", "act_mul", "rotary_store_kv"])
def test_a_fusion_that_changes_the_logits_is_undone(
    op: str, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(*args: Any) -> Any:
        result = getattr(TORCH, op)(*args)
        return result * 1.5 if isinstance(result, Tensor) else (result[0] * 1.5, result[1])

    changes: dict[str, Any] = {op: wrong}
    with caplog.at_level(logging.WARNING):
        found = fusions_of(*FAMILIES["llama"], replace(TORCH, **changes))
    assert len(found) == 3
    assert "not fused" in caplog.text


def test_other_models_of_the_same_class_are_untouched() -> None:
    before = build(*FAMILIES["llama"][:1])
    prepared("llama", FUSED)
    after = build(*FAMILIES["llama"][:1])
    for module in (*before.modules(), *after.modules()):
        assert "forward" not in vars(module)
        assert not isinstance(module, MergedLinear)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_nothing_is_fused_for_ops_that_do_not_fuse(name: str) -> None:
    loaded = prepared(name, TORCH)
    assert not any("forward" in vars(module) for module in loaded.model.modules())
    request = greedy(b"once upon", 6)
    check_greedy(reference(name), run(make_engine(loaded), [(0, request)]), request)
