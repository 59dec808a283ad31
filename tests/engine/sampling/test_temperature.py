"""Temperatures at both ends of all numbers: greedy in one limit, uniform in the other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.core.request import SamplingParams
from engine.sampling.sampler import SampledTokens, Sampler
from engine.sampling.torch_sampler import TorchSampler
from engine.sampling.triton_sampler import TritonSampler

SMALL = [9e-4, 1e-10, 1e-30, 1e-37, 1e-38, 1e-40, 1e-45, 1e-60, 5e-324]
LARGE = [1e10, 1e38, 1e39, 1.7e308]
both_samplers = pytest.mark.parametrize(
    "make",
    [TorchSampler, pytest.param(TritonSampler, marks=pytest.mark.slow)],  # interpreted
)
Make = type[TorchSampler] | type[TritonSampler]


def sample(make: Make, logits: Tensor, params: list[SamplingParams]) -> SampledTokens:
    """Sample each row of the logits by its own parameters, each in its own slot."""
    slots = np.arange(len(params))
    sampler: Sampler = make(len(params), logits.shape[1], torch.device("cpu"))
    for slot, p in enumerate(params):
        sampler.set_parameters(slot, p)
        if sampler.slots.needs_counts(slot):
            sampler.slots.start_counts(slot, torch.tensor([0, 1]), 1)
    plan = sampler.plan(slots, slots + 1)
    arrays = {name: torch.from_numpy(array) for name, array in plan.arrays.items()}
    return sampler.sample(logits.clone(), arrays, plan.kind)


def kinds(temperature: float, num_rows: int, **others: float) -> list[SamplingParams]:
    return [
        SamplingParams(
            do_sample=True,
            temperature=temperature,
            seed=seed,
            logprobs=True,
            top_n_tokens=3,
            **others,  # type: ignore[arg-type]
        )
        for seed in range(num_rows)
    ]


def logprobs_of(sampled: SampledTokens) -> list[float]:
    assert sampled.logprobs is not None
    return sampled.logprobs.tolist()


@both_samplers
@pytest.mark.parametrize("others", [{}, {"top_k": 9, "top_p": 0.9}, {"typical_p": 0.9}], ids=str)
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_best_token_is_certain_at_a_small_temperature(
    make: Make, others: dict[str, float], entropy: int
) -> None:
    """Whatever the scale of the scores is, and although some tokens are excluded."""
    rng = np.random.default_rng(entropy)
    logits = torch.from_numpy(rng.permuted(np.tile(np.arange(40), (len(SMALL), 1)), axis=1)).float()
    logits = (logits - float(rng.integers(0, 40))) * float(rng.choice([0.125, 1.0, 500.0]))
    logits[logits == logits.amin(-1, keepdim=True)] = -math.inf
    params = [kinds(temperature, 1, **others)[0] for temperature in SMALL]
    sampled = sample(make, logits, params)
    assert torch.equal(sampled.ids, logits.argmax(-1))
    assert logprobs_of(sampled) == [0.0] * len(SMALL)
    assert sampled.top_ids is not None
    assert sampled.top_logprobs is not None
    assert torch.equal(sampled.top_ids[:, 0], sampled.ids)
    assert (sampled.top_logprobs[:, 0] == 0).all()
    assert (sampled.top_logprobs[:, 1:] < -100).all()


@both_samplers
@pytest.mark.parametrize("temperature", [9e-4, 1e-38])
def test_tied_best_tokens_share_the_draws_at_a_small_temperature(
    make: Make, temperature: float
) -> None:
    """60 fair draws: fewer than 12 of one side are less likely than one in a million."""
    logits = torch.linspace(3.0, 9.0, 12)
    logits[[2, 7]] = 20.0
    sampled = sample(make, logits.expand(60, 12), kinds(temperature, 60))
    counts = torch.bincount(sampled.ids, minlength=12)
    assert counts[[2, 7]].sum() == 60
    assert counts[[2, 7]].min() >= 12
    assert logprobs_of(sampled) == pytest.approx([math.log(0.5)] * 60, abs=1e-6)


@both_samplers
@pytest.mark.parametrize("temperature", LARGE)
def test_all_tokens_are_equally_likely_at_a_large_temperature(
    make: Make, temperature: float
) -> None:
    logits = torch.linspace(-30.0, 30.0, 21)
    logits[4] = -math.inf
    sampled = sample(make, logits.expand(40, 21), kinds(temperature, 40))
    assert 4 not in sampled.ids
    assert len(set(sampled.ids.tolist())) > 8
    assert logprobs_of(sampled) == pytest.approx([-math.log(20)] * 40, abs=1e-5)


@both_samplers
def test_penalties_come_before_a_small_temperature(make: Make) -> None:
    """Token 0 is in the prompt and token 1 was generated: the penalties leave token 2 the best."""
    logits = torch.tensor([[5.0, 6.0, 4.0, 3.0]])
    penalties = {"repetition_penalty": 2.0, "presence_penalty": 1.0}
    sampled = sample(make, logits, kinds(1e-38, 1, **penalties))
    assert sampled.ids.tolist() == [2]
    assert logprobs_of(sampled) == [0.0]
