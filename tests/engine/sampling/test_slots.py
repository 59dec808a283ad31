"""Every sampling parameter reaches both samplers: a forgotten one fails here by its name."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.core.request import SamplingParams
from engine.sampling import torch_sampler, triton_sampler
from engine.sampling.sampler import Sampler, SamplingPlan
from engine.sampling.slots import HOST_ONLY, STEP_PARAMETERS, SamplingSlots, check_heeded
from engine.sampling.torch_sampler import TorchSampler
from engine.sampling.triton_sampler import TritonSampler
from tests.engine.recording import Recording

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
    "output_frequency_penalty": 0.5,
    "logit_bias": ((3, -1.5), (7, 100.0)),
    "seed": 7,
    "logprobs": True,
    "top_n_tokens": 2,
    "raw_logprobs": True,
    "watermark": True,
}
"""A value of every parameter that is not its neutral one."""
both_samplers = pytest.mark.parametrize("make", [TorchSampler, TritonSampler])


def test_each_sampler_heeds_exactly_the_parameters_of_a_step() -> None:
    others = {"seed", "logprobs", "raw_logprobs", "logit_bias", "watermark"}
    names = {f.name for f in fields(SamplingParams)} - others
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
    is_sampled = name not in ("do_sample", "logprobs")  # sampled tokens always have logprobs
    sampled = replace(NEUTRAL, do_sample=is_sampled, logprobs=name == "raw_logprobs")
    changed = replace(sampled, **{name: USED[name]})
    assert differ(plan(make, sampled), plan(make, changed)) or name in ("watermark", "logit_bias")


@both_samplers
def test_what_changes_the_logits_before_sampling_is_known_by_row(
    make: type[TorchSampler] | type[TritonSampler],
) -> None:
    sampler: Sampler = make(3, 10, CPU)
    sampler.set_parameters(0, replace(NEUTRAL, watermark=True))
    sampler.set_parameters(1, replace(NEUTRAL, logit_bias=((3, -1.5), (7, 100.0))))
    sampler.set_parameters(2, replace(NEUTRAL, logit_bias=((0, 2.0),)))
    slots = np.array([2, 3, 0, 1])
    assert sampler.slots.watermarked(slots).tolist() == [2]
    biases = {name: array.tolist() for name, array in sampler.slots.biases(slots).items()}
    assert biases == {
        "biased_rows": [0, 3, 3],
        "biased_ids": [0, 3, 7],
        "biases": [2.0, -1.5, 100.0],
    }
    for slot in (1, 2):  # the slots get other sequences
        sampler.set_parameters(slot, NEUTRAL)
    assert sampler.slots.biases(slots) == {}


@both_samplers
def test_raw_logprobs_matter_only_where_logprobs_are_asked_for(
    make: type[TorchSampler] | type[TritonSampler],
) -> None:
    raw = replace(NEUTRAL, raw_logprobs=True)
    assert not plan(make, raw).kind.raw_logprobs
    assert plan(make, replace(raw, logprobs=True)).kind.raw_logprobs
    assert plan(make, replace(raw, top_n_tokens=1)).kind.raw_logprobs


@both_samplers
@pytest.mark.parametrize("name", STEP_PARAMETERS)
def test_a_slot_with_any_step_parameter_is_not_plain(
    make: type[TorchSampler] | type[TritonSampler], name: str
) -> None:
    assert not plan(make, replace(NEUTRAL, **{name: USED[name]})).kind.plain
    assert plan(make, replace(NEUTRAL, **{other: USED[other] for other in HOST_ONLY})).kind.plain


def test_counting_the_tokens_of_a_new_sequence_waits_for_nothing() -> None:
    slots, known = SamplingSlots(2, 8, CPU), torch.tensor([1, 2, 3, 3])
    slots.all_counts()
    with Recording():  # raises where it would
        for counts_prompt in (True, False):
            slots.start_counts(0, known, 2, counts_prompt)
