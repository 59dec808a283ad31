"""Every sampling parameter reaches both samplers: a forgotten one fails here by its name."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.core.request import SamplingParams
from engine.sampling import torch_sampler, triton_sampler
from engine.sampling.sampler import Sampler, SamplingPlan
from engine.sampling.slots import HOST_ONLY, STEP_PARAMETERS, check_heeded
from engine.sampling.torch_sampler import TorchSampler
from engine.sampling.triton_sampler import TritonSampler

CPU = torch.device("cpu")
NEUTRAL = SamplingParams()
USED: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "typical_p": 0.5,
    "repetition_penalty": 1.5,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "seed": 7,
    "logprobs": True,
    "top_n_tokens": 2,
    "watermark": True,
}
"""A value of every parameter that is not its neutral one."""
both_samplers = pytest.mark.parametrize("make", [TorchSampler, TritonSampler])


def test_each_sampler_heeds_exactly_the_parameters_of_a_step() -> None:
    names = {f.name for f in fields(SamplingParams)} - {"seed", "logprobs", "watermark"}
    assert set(STEP_PARAMETERS) == names
    assert set(torch_sampler.HEEDED) == names
    assert set(triton_sampler.HEEDED) == names


def test_a_parameter_that_a_sampler_does_not_know_is_named() -> None:
    with pytest.raises(AssertionError, match=r"the new sampler and .* differ in top_k, top_q"):
        check_heeded("the new sampler", {*STEP_PARAMETERS, "top_q"} - {"top_k"})


def plan(make: type[TorchSampler] | type[TritonSampler], params: SamplingParams) -> SamplingPlan:
    sampler: Sampler = make(1, 10, CPU)
    sampler.set_parameters(0, params)
    return sampler.plan(np.array([0]), np.array([5]))


def differ(one: SamplingPlan, other: SamplingPlan) -> bool:
    if one.kind != other.kind or one.arrays.keys() != other.arrays.keys():
        return True
    return any(not np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)


@both_samplers
@pytest.mark.parametrize("name", [f.name for f in fields(SamplingParams)])
def test_every_parameter_changes_the_plan_of_a_step(
    make: type[TorchSampler] | type[TritonSampler], name: str
) -> None:
    sampled = replace(NEUTRAL, do_sample=name != "do_sample")
    changed = replace(sampled, **{name: USED[name]})
    if name == "watermark":  # not in the plan: the runner changes the logits before sampling
        sampler = make(1, 10, CPU)
        sampler.set_parameters(0, changed)
        assert sampler.slots.watermarked(np.array([1, 0])).tolist() == [1]
    else:
        assert differ(plan(make, sampled), plan(make, changed))


@both_samplers
@pytest.mark.parametrize("name", STEP_PARAMETERS)
def test_a_slot_with_any_step_parameter_is_not_plain(
    make: type[TorchSampler] | type[TritonSampler], name: str
) -> None:
    assert not plan(make, replace(NEUTRAL, **{name: USED[name]})).kind.plain
    assert plan(make, replace(NEUTRAL, **{other: USED[other] for other in HOST_ONLY})).kind.plain
