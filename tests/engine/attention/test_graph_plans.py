"""A graph's arrays have the same sizes for every step of its shape, and room for its work."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.kv_cache import AttentionCall
from engine.attention.plan import PADDING, GraphShape, StepSequences, TritonPlanner
from kernels.paged_attention.mask import MaskSpec

NUM_SLOTS = 257  # of 256 sequences, and the one that pads
LONGEST = 131_072


def planner(num_heads: int, num_kv_heads: int) -> TritonPlanner:
    call = AttentionCall(torch.nn.Identity(), num_heads, num_kv_heads, 128, 128, MaskSpec())
    return TritonPlanner([call], (NUM_SLOTS, 8), 2048, torch.device("cpu"), False)


@st.composite
def steps(draw: st.DrawFn, num_tokens: int) -> StepSequences:
    """Draw decodes and chunks of prompts that fit, padded to `num_tokens` rows."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    num_decodes = draw(st.integers(0, min(200, num_tokens)))
    left, lengths = num_tokens - num_decodes, [1] * num_decodes
    longest_chunk = draw(st.sampled_from([2, 3, 40, 700, 2048]))
    while left > 1 and len(lengths) < NUM_SLOTS - 1 and rng.random() < 0.98:
        lengths.append(int(rng.integers(2, min(longest_chunk, left) + 1)))
        left -= lengths[-1]
    own = len(lengths)
    starts = rng.integers(0, LONGEST, size=own)
    return StepSequences(
        np.concatenate([np.arange(own), np.full(left, NUM_SLOTS - 1)]),
        np.concatenate([starts, np.full(left, PADDING)]),
        np.array(lengths + [1] * left),
    )


@pytest.mark.parametrize("heads", [(32, 8), (16, 16), (64, 8), (8, 1)])
@pytest.mark.parametrize("num_tokens", [16, 512, 2048])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_mixed_step_fits_its_graph(
    heads: tuple[int, int], num_tokens: int, data: st.DataObject
) -> None:
    shape = GraphShape(num_tokens, min(num_tokens, NUM_SLOTS - 1), prefills=True)
    own = planner(*heads)
    plan = own.plan(data.draw(steps(num_tokens)), np.zeros((NUM_SLOTS, 8), np.int64), shape)
    *others, last = plan.arrays
    empty = own.plan(
        StepSequences(
            np.full(num_tokens, NUM_SLOTS - 1),
            np.full(num_tokens, PADDING),
            np.ones(num_tokens, np.int64),
        ),
        np.zeros((NUM_SLOTS, 8), np.int64),
        shape,
    )
    assert [plan.arrays[name].shape for name in others] == [
        empty.arrays[name].shape for name in others
    ]
    assert plan.capacity is not None
    assert len(plan.arrays[last]) <= plan.capacity
    assert len(own._counters) >= plan.capacity * heads[1], "each decode item has its counter"
