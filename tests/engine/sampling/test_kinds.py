"""The kinds of sampling that are compiled and captured ahead are all that there are."""

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.request import SamplingParams
from engine.sampling.triton_sampler import TritonSampler
from tests.engine.sampling.test_slots import USED

NAMES = [field.name for field in fields(SamplingParams)]
CPU = torch.device("cpu")
some_parameters = st.sets(st.sampled_from(NAMES)).map(
    lambda names: SamplingParams(**{name: USED[name] for name in names})
)


def sampler_of(requests: list[SamplingParams], **options: Any) -> TritonSampler:
    sampler = TritonSampler(len(requests), 300, CPU, **options)
    for slot, params in enumerate(requests):
        sampler.set_parameters(slot, params)
    return sampler


@settings(max_examples=300, deadline=None)
@given(st.lists(some_parameters, min_size=1, max_size=4))
def test_any_batch_of_any_parameters_is_of_a_listed_kind(requests: list[SamplingParams]) -> None:
    sampler = sampler_of(requests)
    kind = sampler.plan(np.arange(len(requests)), np.full(len(requests), 9)).kind
    assert kind.of_own_logits in (*sampler.usual_kinds, *sampler.rare_kinds)


def test_any_number_of_top_tokens_up_to_the_limit_is_of_one_kind() -> None:
    for limit in (5, 20, 100):
        asked = [SamplingParams(top_n_tokens=n) for n in range(1, limit + 1)]
        sampler = sampler_of(asked, max_top_tokens=limit)
        kinds = {sampler.plan(np.array([slot]), np.array([9])).kind for slot in range(limit)}
        assert kinds == {sampler.rare_kinds[0]}


def test_no_kind_is_listed_twice() -> None:
    sampler = sampler_of([SamplingParams()])
    listed = sampler.usual_kinds + sampler.rare_kinds
    assert len(set(listed)) == len(listed) == 6
    assert all(kind == kind.of_own_logits for kind in listed)


def test_what_chats_use_is_usual() -> None:
    chats = [SamplingParams(), SamplingParams(do_sample=True, temperature=0.7, top_p=0.9)]
    for params in chats:
        sampler = sampler_of([params])
        assert sampler.plan(np.array([0]), np.array([9])).kind in sampler.usual_kinds
