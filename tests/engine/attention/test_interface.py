"""Keywords of attention: those that are known to be safe pass, all others are refused by name."""

from functools import partial

import numpy as np
import pytest
import torch

from engine.attention.interface import (
    LayerCache,
    PagedAttention,
    StepContext,
    attention_forward,
    unsupported_keywords,
)
from engine.core.errors import LoadError
from engine.loading.probe import discover
from kernels.ops import TORCH
from kernels.paged_attention.mask import MaskSpec
from kernels.paged_attention.reference import AttentionMetadata
from tests.engine.models import reference


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scaling", 0.1),
        ("softcap", 50.0),
        ("s_aux", torch.ones(4)),
        ("sliding_window", 128),
        ("position_ids", torch.zeros(1, 5)),
        ("use_cache", True),
        ("output_attentions", True),
        ("dropout", 0.0),
        ("is_causal", True),
        ("is_causal", None),
        ("block_indices", None),
        ("never_heard_of", None),
    ],
)
def test_a_keyword_that_asks_for_nothing_new_is_supported(name: str, value: object) -> None:
    assert unsupported_keywords({name: value}) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout", 0.1),
        ("is_causal", False),
        ("indices", torch.zeros(1, 5)),
        ("block_indices", torch.zeros(1, 5)),
        ("position_bias", torch.zeros(1, 5)),
        ("sinks", torch.zeros(4)),
        ("cu_seq_lens_q", torch.zeros(2)),
        ("never_heard_of", False),
    ],
)
def test_any_other_keyword_is_refused_by_name(name: str, value: object) -> None:
    assert unsupported_keywords({"scaling": 0.1, name: value, "use_cache": True}) == [name]


def test_serving_raises_on_a_keyword_that_it_does_not_know() -> None:
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(TypeError, match="attention does not support never_heard_of"):
        attention_forward(torch.nn.Identity(), x, x, x, None, never_heard_of=1)


def test_a_model_that_passes_an_unknown_keyword_is_refused_at_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = reference("llama", num_hidden_layers=1)
    attention = next(module for module in model.modules() if hasattr(module, "q_proj"))
    passing = partial(attention.forward, never_heard_of=torch.ones(1))
    monkeypatch.setattr(attention, "forward", passing)
    with pytest.raises(LoadError, match="LlamaAttention passes never_heard_of to attention"):
        discover(model)


# -- modules that attend several times in a forward ------------------------------------------


def metadata() -> AttentionMetadata:
    """Return a step's metadata. Steps that run in one graph have the same."""
    none = np.zeros(0, dtype=np.int64)
    return AttentionMetadata(none, none, none.reshape(0, 0), torch.zeros(0), block_size=16)


def test_calls_are_counted_anew_after_a_forward_that_broke_off() -> None:
    caches = [LayerCache(torch.zeros(1), torch.zeros(1), MaskSpec(), True) for _ in range(3)]
    context = StepContext(TORCH, [])
    paged, step = PagedAttention(context, caches), metadata()
    context.begin(step)
    assert [paged.next_call() for _ in range(2)] == [(caches[0], step), (caches[1], step)]
    context.begin(step)
    assert [paged.next_call()[0] is cache for cache in caches] == [True] * 3


def test_a_call_that_was_not_seen_at_load_is_an_error() -> None:
    cache = LayerCache(torch.zeros(1), torch.zeros(1), MaskSpec(), True)
    context = StepContext(TORCH, [])
    paged = PagedAttention(context, [cache])
    context.begin(metadata())
    paged.next_call()
    with pytest.raises(IndexError):
        paged.next_call()
