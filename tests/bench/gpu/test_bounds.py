"""The least time of a step: arithmetic, checked against sums done by hand."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from bench.gpu import models
from bench.gpu.bounds import (
    Attention,
    Matmul,
    ModelCost,
    Rates,
    decode_work,
    ideal_seconds,
    matmuls_of,
    prefill_work,
    visible,
)
from engine.attention.kv_cache import AttentionCall
from kernels.paged_attention.mask import MaskSpec
from tests.engine.models import prepared, reference

RATES = Rates(bytes_per_s=1e9, flops_per_s=1e10)
HEADS, DIMS, TOKEN_BYTES = 4, 16, 64
WHOLE = MaskSpec()


def matrices(*sizes: Matmul) -> ModelCost:
    return ModelCost(Counter(sizes), Counter())


def attention(mask: MaskSpec = WHOLE, writes: bool = True) -> ModelCost:
    return ModelCost(Counter(), Counter([Attention(HEADS, DIMS, TOKEN_BYTES, mask, writes)]))


def test_a_small_batch_is_bound_by_reading_the_weights() -> None:
    work = decode_work(matrices(Matmul(5000, 10_000)), 1, 1000, RATES)
    assert work.seconds == pytest.approx(10_000 / 1e9)
    assert (work.num_bytes, work.flops) == (10_000, 2 * 5000)


def test_a_large_batch_is_bound_by_computing() -> None:
    work = decode_work(matrices(Matmul(5000, 10_000)), 1000, 1, RATES)
    assert work.seconds == pytest.approx(2 * 5000 * 1000 / 1e10)


def test_each_operation_has_a_bound_of_its_own() -> None:
    """One that computes does not hide another that reads."""
    reads, computes = Matmul(1000, 20_000), Matmul(5000, 1)
    together = decode_work(matrices(reads, computes), 50, 1, RATES)
    assert together.seconds == pytest.approx(20_000 / 1e9 + 2 * 5000 * 50 / 1e10)


def test_each_sequence_reads_its_own_context_and_writes_a_token() -> None:
    one = decode_work(attention(), 1, 100, RATES)
    assert one.num_bytes == (100 + 1) * TOKEN_BYTES
    assert one.flops == 2 * 100 * HEADS * DIMS
    assert decode_work(attention(), 7, 100, RATES).seconds == pytest.approx(7 * one.seconds)


def test_a_window_bounds_what_is_read() -> None:
    assert decode_work(attention(MaskSpec(window=10)), 1, 100, RATES).num_bytes == 11 * TOKEN_BYTES


def test_a_call_that_shares_anothers_cache_does_not_write_it() -> None:
    assert decode_work(attention(writes=False), 1, 100, RATES).num_bytes == 100 * TOKEN_BYTES


@pytest.mark.parametrize("mask", [MaskSpec(), MaskSpec(window=5), MaskSpec(chunk=8)])
def test_visible_keys_are_those_that_the_mask_allows(mask: MaskSpec) -> None:
    positions = np.arange(40)
    keys = np.arange(40)[None]
    queries = positions[:, None]
    allowed = (keys <= queries) & (keys > queries - mask.window)
    allowed &= keys >= queries // mask.chunk * mask.chunk
    assert visible(mask, positions).tolist() == allowed.sum(axis=1).tolist()


def test_a_prompt_computes_half_of_a_square() -> None:
    assert prefill_work(attention(), 1, 3, 0, RATES).flops == 2 * (1 + 2 + 3) * HEADS * DIMS
    windowed = prefill_work(attention(MaskSpec(window=2)), 1, 3, 0, RATES)
    assert windowed.flops == 2 * (1 + 2 + 2) * HEADS * DIMS


def test_a_chunk_reads_what_came_before_it() -> None:
    work = prefill_work(attention(), 2, 3, 10, RATES)
    assert work.num_bytes == 2 * (13 + 3) * TOKEN_BYTES
    assert work.flops == 2 * 2 * (11 + 12 + 13) * HEADS * DIMS
    windowed = prefill_work(attention(MaskSpec(window=4)), 1, 3, 10, RATES)
    assert windowed.num_bytes == (3 + 3 + 3) * TOKEN_BYTES  # from 3 before the first


def test_a_prompt_has_logits_of_its_last_token_alone() -> None:
    layer, head = Matmul(100, 200), Matmul(30, 60, of_samples=True)
    work = prefill_work(matrices(layer, head), 2, 8, 0, RATES)
    assert work.flops == 2 * 100 * 16 + 2 * 30 * 2


def test_the_operations_of_a_model_are_its_linears() -> None:
    head = nn.Linear(4, 10)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6), nn.Linear(4, 6), head)
    found = matmuls_of(model.to(torch.bfloat16), head)
    assert found == Counter({Matmul(24, 48): 2, Matmul(40, 80, of_samples=True): 1})


def expected_distinct(num_experts: int, num_chosen: int, num_tokens: int) -> float:
    """By playing it."""
    rng = np.random.default_rng(0)
    rounds = [
        {int(e) for _ in range(num_tokens) for e in rng.permutation(num_experts)[:num_chosen]}
        for _ in range(3000)
    ]
    return sum(map(len, rounds)) / len(rounds)


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_a_step_reads_the_experts_that_its_tokens_choose(batch: int) -> None:
    experts = Matmul(100, 200, num_experts=8, num_chosen=2)
    work = decode_work(matrices(experts), batch, 1, RATES)
    assert work.num_bytes == pytest.approx(200 * expected_distinct(8, 2, batch), rel=0.02)
    assert work.flops == 2 * batch * 2 * 100


def test_the_weights_of_experts_and_routers_are_counted() -> None:
    loaded = prepared("mixtral")  # of 4 layers with 4 experts, 2 for each token
    found = ModelCost.of(loaded, 4).matmuls
    assert found[Matmul(2 * 80 * 48, 4 * 2 * 80 * 48, num_experts=4, num_chosen=2)] == 4
    assert found[Matmul(48 * 80, 4 * 48 * 80, num_experts=4, num_chosen=2)] == 4
    assert found[Matmul(4 * 48, 4 * 4 * 48)] == 4
    assert sum(found.values()) == 4 * (4 + 3) + 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma2", "mixtral"])
def test_all_weights_of_a_model_are_counted_but_vectors_and_embeddings(name: str) -> None:
    own = reference(name)
    embeddings = sum(m.weight.numel() for m in own.modules() if isinstance(m, nn.Embedding))
    matrices = sum(p.numel() for p in own.parameters() if p.dim() > 1)
    tied = own.config.get_text_config().tie_word_embeddings
    head = own.get_input_embeddings().get_parameter("weight").numel() if tied else 0
    cost = ModelCost.of(prepared(name), 4)
    assert cost.weight_bytes == 4 * (matrices - embeddings + head)


def test_a_workload_takes_its_prompts_and_then_all_its_tokens() -> None:
    cost = ModelCost(
        Counter([Matmul(5000, 10_000)]), Counter([Attention(HEADS, DIMS, TOKEN_BYTES, WHOLE)])
    )
    expected = prefill_work(cost, 2, 10, 0, RATES).seconds
    expected += decode_work(cost, 2, 11, RATES).seconds
    expected += decode_work(cost, 1, 12, RATES).seconds  # the shorter one has ended
    assert ideal_seconds(cost, [(10, 2), (10, 3)], RATES) == pytest.approx(expected)


def test_an_8b_model_on_an_h200() -> None:
    """The figures that the design aims at, from this card's 4.3 TB/s and 790 TFLOP/s."""
    model = models.build("Llama-3.1-8B", torch.device("meta"), torch.bfloat16)
    calls = [AttentionCall(nn.Identity(), 32, 8, 128, 128, MaskSpec()) for _ in range(32)]
    cost = ModelCost(
        matmuls_of(model, model.get_output_embeddings()),
        Counter(Attention.of(call, 2) for call in calls),
    )
    assert cost.weight_bytes == pytest.approx(15.0e9, rel=2e-3)
    rates = Rates(4.3e12, 790e12)
    for batch, tokens_per_s in {1: 284, 32: 7128, 256: 19915}.items():
        seconds = decode_work(cost, batch, 1024, rates).seconds
        assert batch / seconds == pytest.approx(tokens_per_s, rel=5e-3)
    seconds = ideal_seconds(cost, [(1000, 1000)] * 256, rates)
    assert 256 * 1000 / seconds == pytest.approx(12089, rel=1e-2)
