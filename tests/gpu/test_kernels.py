"""The kernels on the device, at real shapes, against float64."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.attention.kv_cache import AttentionCall, copy_blocks
from engine.attention.plan import PADDING, FixedTables, GraphShape, StepSequences, make_planner
from engine.core.config import BLOCK_SIZE
from engine.core.request import SamplingParams
from engine.device.packed_arrays import PackedArrays
from engine.sampling.torch_sampler import TorchSampler
from engine.sampling.triton_sampler import TritonSampler
from engine.step.graphs import CudaCapture
from kernels.norm import NormForm, norm_torch
from kernels.ops import TORCH, TRITON
from kernels.paged_attention.plan import PagedBatch
from kernels.store_kv import Rotary
from tests.gpu.shapes import SHAPES, Shape

DTYPES = [torch.bfloat16, torch.float16]
CUDA = torch.device("cuda")
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])

BATCHES = {
    "decode": ([1] * 33, [1, 2, 15, 16, 17, 127, 128, 129, 3000, *range(40, 2440, 100)]),
    "one long decode": ([1], [8191]),
    "prefill": ([700, 33], [700, 33]),
    "mixed": ([1, 65, 1, 300], [2000, 65, 31, 4500]),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return numbers that are there: a norm loads its weight before the kernel ahead ends."""
    values = torch.randn(*shape, device=CUDA, dtype=dtype)
    torch.cuda.synchronize()
    return values


class Step:
    """A batch over shuffled blocks, whose unused slots hold NaN."""

    def __init__(self, shape: Shape, batch: str, dtype: torch.dtype):
        query_lens, seq_lens = (np.array(lens, dtype=np.int64) for lens in BATCHES[batch])
        width = -(-int(seq_lens.max()) // BLOCK_SIZE)
        num_blocks = len(seq_lens) * width
        tables = np.random.default_rng(0).permutation(num_blocks).reshape(-1, width)
        call = AttentionCall(
            torch.nn.Identity(),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.head_dim,
            shape.mask,
        )
        self.call = call
        self.shape, self.tables, self.seq_lens, self.query_lens = (
            shape,
            tables,
            seq_lens,
            query_lens,
        )
        self.sequences = StepSequences(np.arange(len(seq_lens)), seq_lens - query_lens, query_lens)
        metadata = FixedTables(TRITON, [call], tables, CUDA).metadata(self.sequences)
        assert isinstance(metadata, PagedBatch)
        self.metadata = metadata
        cache = (num_blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
        self.keys, self.values = randn(*cache, dtype=dtype), randn(*cache, dtype=dtype)
        for table, length in zip(tables, seq_lens, strict=True):
            for cache_ in (self.keys, self.values):
                owned = cache_[torch.from_numpy(table).to(CUDA)].flatten(0, 1)
                owned[length:] = torch.nan
                cache_[torch.from_numpy(table).to(CUDA)] = owned.view(-1, *cache_.shape[1:])
        self.query = randn(int(query_lens.sum()), shape.num_heads, shape.head_dim, dtype=dtype)

    def captured(self, num_rows: int) -> PagedBatch:
        """Return the metadata that a captured step of so many tokens reads."""
        num_padding = num_rows - len(self.query)
        width = self.tables.shape[1]
        tables = np.concatenate([self.tables, np.zeros((1, width), dtype=np.int64)])
        padded = StepSequences(
            np.append(self.sequences.slots, np.full(num_padding, len(self.tables))),
            np.append(self.sequences.starts, np.full(num_padding, PADDING)),
            np.append(self.sequences.lengths, np.ones(num_padding, dtype=np.int64)),
        )
        graph = GraphShape(num_rows, num_rows, prefills=True)
        shape = len(tables), width
        planner = make_planner(TRITON, [self.call], shape, num_rows, CUDA)
        update = planner.update(np.arange(tables.size), tables.reshape(-1))
        planner.apply_update(PackedArrays(update).upload(CUDA))
        plan = planner.plan(padded, tables, graph)
        slots = {"slot_mapping": np.full(num_rows, -1)}
        arrays = PackedArrays(slots | plan.arrays, plan.capacity)
        buffer = torch.zeros(arrays.max_bytes, dtype=torch.uint8, device=CUDA)
        arrays.copy_to(buffer)
        metadata = planner.metadata(arrays.unpack(buffer), plan.host_arrays)
        assert isinstance(metadata, PagedBatch)
        return metadata

    def expected(self) -> Tensor:
        outputs, start = [], 0
        for i, (length, count) in enumerate(zip(self.seq_lens, self.query_lens, strict=True)):
            table = torch.from_numpy(self.tables[i]).to(CUDA)
            keys, values = (
                cache[table].flatten(0, 1)[:length].double().transpose(0, 1)
                for cache in (self.keys, self.values)
            )
            query = self.query[start : start + count].double().transpose(0, 1)
            outputs.append(self._attend(query, keys, values, int(length), int(count)))
            start += count
        return torch.cat(outputs)

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, length: int, count: int
    ) -> Tensor:
        shape = self.shape
        group = shape.num_heads // shape.num_kv_heads
        keys, values = (x.repeat_interleave(group, dim=0) for x in (keys, values))
        scores = query @ keys.transpose(1, 2) * shape.head_dim**-0.5
        if shape.softcap is not None:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        q = torch.arange(length - count, length, device=CUDA)[:, None]
        k = torch.arange(length, device=CUDA)
        scores.masked_fill_((k > q) | (k <= q - shape.mask.window), -torch.inf)
        return (scores.softmax(-1) @ values).transpose(0, 1)


def assert_close(actual: Tensor, expected: Tensor, factor: float = 4.0) -> None:
    tolerance = factor * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@each_shape
@each_dtype
@pytest.mark.parametrize("batch", BATCHES)
def test_paged_attention(shape: Shape, dtype: torch.dtype, batch: str) -> None:
    step = Step(shape, batch, dtype)
    output = TRITON.paged_attention(
        step.query,
        step.keys,
        step.values,
        step.metadata,
        shape.mask,
        scale=shape.head_dim**-0.5,
        softcap=shape.softcap,
    )
    assert_close(output, step.expected())
    assert not step.metadata.counters.any()


@pytest.mark.parametrize("batch", BATCHES)
def test_paged_attention_over_an_8_bit_cache(batch: str) -> None:
    shape = SHAPES["Llama-3.1-8B"]
    step = Step(shape, batch, torch.bfloat16)
    scales = torch.rand(2, shape.num_kv_heads, device=CUDA) * 0.1 + 0.01
    keys = (step.keys / scales[0, :, None]).to(torch.float8_e4m3fn)
    values = (step.values / scales[1, :, None]).to(torch.float8_e4m3fn)
    step.keys = keys.double() * scales[0, :, None]
    step.values = values.double() * scales[1, :, None]
    output = TRITON.paged_attention(
        step.query,
        keys,
        values,
        step.metadata,
        shape.mask,
        scale=shape.head_dim**-0.5,
        k_scale=scales[0],
        v_scale=scales[1],
    )
    assert_close(output, step.expected())


@pytest.mark.parametrize("num_rows", [512, 2048])
def test_attention_of_a_captured_step_is_that_of_the_step(num_rows: int) -> None:
    """With room for any step of the graph's shape, and padding, no bit of a row changes."""
    shape = SHAPES["Llama-3.1-8B"]
    step = Step(shape, "mixed", torch.bfloat16)
    exact = TRITON.paged_attention(
        step.query, step.keys, step.values, step.metadata, shape.mask, scale=0.1
    )
    num_padding = num_rows - len(step.query)
    padding = randn(num_padding, shape.num_heads, shape.head_dim, dtype=torch.bfloat16)
    query = torch.cat([step.query, padding])
    attend = partial(
        TRITON.paged_attention,
        query,
        step.keys,
        step.values,
        step.captured(num_rows),
        shape.mask,
        scale=0.1,
    )
    graph, output = CudaCapture()(lambda: (attend(), attend())[1])
    graph.replay()
    assert torch.equal(output[: len(exact)], exact)
    assert not output[len(exact) :].any()


@pytest.mark.parametrize("batch", ["decode", "prefill"])
def test_attention_of_heads_of_eight(batch: str) -> None:
    """As in the tiny models that others test with: matrix units take no fewer than 16."""
    shape = Shape(32, 64, 4, 2, 8, 100)
    step = Step(shape, batch, torch.bfloat16)
    output = TRITON.paged_attention(
        step.query, step.keys, step.values, step.metadata, shape.mask, scale=8**-0.5
    )
    assert_close(output, step.expected())


@pytest.mark.parametrize("captured", [False, True])
def test_kernels_that_start_early_wait_for_their_input(captured: bool) -> None:
    """A chain whose every kernel reads what the one ahead wrote, and reuses its memory."""
    shape = SHAPES["Llama-3.1-8B"]
    x, weight = randn(4, shape.hidden, dtype=torch.bfloat16), randn(shape.hidden, dtype=DTYPES[0])
    form = NormForm(1e-6)

    def chain(wait: Callable[[], object]) -> Tensor:
        product = x
        for _ in range(40):
            normed, total = TRITON.add_norm(product, x, weight, None, form)
            wait()
            product = TRITON.act_mul(normed, TRITON.norm(total, weight, None, form), "silu")
            wait()
        return product

    expected = chain(torch.cuda.synchronize)
    run = partial(chain, lambda: None)
    for _ in range(20):
        if captured:
            graph, actual = CudaCapture()(run)
            graph.replay()
        else:
            actual = run()
        assert torch.equal(actual, expected)


@each_shape
@each_dtype
@pytest.mark.parametrize("rows", [1, 33, 4096])
def test_norm_with_the_residual_addition(shape: Shape, dtype: torch.dtype, rows: int) -> None:
    x, residual = randn(2, rows, shape.hidden, dtype=dtype)
    weight = randn(shape.hidden, dtype=dtype)
    form = NormForm(1e-6, offset=shape.norm_offset, rounds_first=False)
    normed, total = TRITON.add_norm(x, residual, weight, None, form)
    assert torch.equal(total, x + residual)
    double = (x + residual).double()
    expected = double * (double.square().mean(-1, keepdim=True) + form.eps).rsqrt()
    assert_close(normed, expected * (weight.double() + shape.norm_offset), factor=1)
    assert torch.equal(TRITON.norm(total, weight, None, form), normed)


@each_dtype
def test_layer_norm(dtype: torch.dtype) -> None:
    hidden = SHAPES["gpt2"].hidden
    x, (weight, bias) = randn(33, hidden, dtype=dtype), randn(2, hidden, dtype=dtype)
    form = NormForm(1e-5, centred=True, rounds_first=False)
    expected = torch.nn.functional.layer_norm(
        x.double(), (hidden,), weight.double(), bias.double(), form.eps
    )
    assert_close(TRITON.norm(x, weight, bias, form), expected, factor=2)


@each_shape
@each_dtype
@pytest.mark.parametrize("rows", [1, 33, 2048])
def test_gated_activation(shape: Shape, dtype: torch.dtype, rows: int) -> None:
    gate, up = randn(rows, 2 * shape.intermediate, dtype=dtype).chunk(2, dim=-1)
    actual = TRITON.act_mul(gate, up, shape.activation)
    assert_close(actual, TORCH.act_mul(gate.double(), up.double(), shape.activation), factor=2)


@each_shape
@each_dtype
def test_rotation_with_the_kv_write(shape: Shape, dtype: torch.dtype) -> None:
    step = Step(shape, "mixed", dtype)
    tokens, dim = len(step.query), shape.head_dim
    qkv = randn(tokens, shape.num_heads + 2 * shape.num_kv_heads, dim, dtype=dtype)
    query, key, value = qkv.split([shape.num_heads, *[shape.num_kv_heads] * 2], dim=1)
    angles = torch.rand(tokens, dim // 2, device=CUDA).repeat(1, 2) * 6
    rotary = Rotary(angles.cos().to(dtype), angles.sin().to(dtype), interleaved=False)
    slots = step.metadata.slot_mapping
    actual_keys, actual_values, keys, values = torch.zeros_like(step.keys).repeat(4, 1, 1, 1, 1)
    actual = TRITON.rotary_store_kv(query, key, value, rotary, actual_keys, actual_values, slots)
    expected = TORCH.rotary_store_kv(query, key, value, rotary, keys, values, slots)
    assert torch.equal(actual, expected)
    assert torch.equal(actual_keys, keys)
    assert torch.equal(actual_values, values)


PARAMS = [
    SamplingParams(),
    SamplingParams(do_sample=True, temperature=0.7, seed=1),
    SamplingParams(do_sample=True, top_k=50, seed=2),
    SamplingParams(do_sample=True, top_p=0.9, temperature=1.3, seed=3),
    SamplingParams(do_sample=True, typical_p=0.8, seed=4),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3),
    SamplingParams(presence_penalty=1.5),
    SamplingParams(output_frequency_penalty=1.5, repetition_penalty=1.2),
    SamplingParams(do_sample=True, temperature=1e-38, seed=6),
    SamplingParams(do_sample=True, temperature=1e-4, top_p=0.9, seed=7),
    SamplingParams(do_sample=True, top_k=1000, top_p=0.95, seed=5, top_n_tokens=5),
]


@each_shape
def test_sampling_draws_what_the_processors_draw(shape: Shape) -> None:
    """Both samplers add the same noise to the same scores, so only rounding can differ."""
    params = [replaced for replaced in PARAMS for _ in range(8)]
    slots = np.arange(len(params))
    logits = randn(len(params), shape.vocab_size, dtype=torch.bfloat16) * 3
    ids = []
    for make in (TorchSampler, TritonSampler):
        sampler = make(len(params), shape.vocab_size, CUDA)
        for slot, p in enumerate(params):
            sampler.set_parameters(slot, p)
            if sampler.slots.needs_counts(slot):
                counts_prompt = sampler.slots.counts_prompt(slot)
                known = torch.arange(20, device=CUDA)
                sampler.slots.start_counts(slot, known, 15, counts_prompt)
        plan = sampler.plan(slots, np.full(len(params), 20))
        uploaded = {name: torch.from_numpy(a).to(CUDA) for name, a in plan.arrays.items()}
        sampled = sampler.sample(logits.clone(), uploaded, plan.kind)
        ids.append(sampled.ids)
    assert (ids[0] == ids[1]).float().mean() > 0.95


@each_shape
@pytest.mark.parametrize("num_top", [0, 20])
def test_reported_logprobs_are_those_of_the_logits(shape: Shape, num_top: int) -> None:
    logits = randn(64, shape.vocab_size, dtype=torch.bfloat16) * 3
    ids = torch.randint(0, shape.vocab_size, (64,), device=CUDA)
    reported = TritonSampler(1, shape.vocab_size, CUDA).report(logits, ids, num_top)
    exact = logits.double().log_softmax(-1)
    assert reported.logprobs is not None
    chosen = exact.gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(reported.logprobs.double(), chosen, rtol=0, atol=1e-5)
    if num_top:
        assert reported.top_ids is not None
        best = exact.topk(num_top).values
        top = exact.gather(-1, reported.top_ids[:, :num_top])
        torch.testing.assert_close(top, best, rtol=0, atol=0)


@each_shape
@pytest.mark.parametrize("rows", [1, 256])
def test_greedy_takes_the_first_of_the_best(shape: Shape, rows: int) -> None:
    logits = randn(rows, shape.vocab_size, dtype=torch.bfloat16)
    sampler = TritonSampler(rows, shape.vocab_size, CUDA)
    for slot in range(rows):
        sampler.set_parameters(slot, SamplingParams(logprobs=True))
    plan = sampler.plan(np.arange(rows), np.ones(rows, dtype=np.int64))
    sampled = sampler.sample(logits, {}, plan.kind)
    best = logits == logits.max(dim=-1, keepdim=True).values
    assert torch.equal(sampled.ids, best.int().argmax(dim=-1))
    assert sampled.logprobs is not None
    chosen = logits.double().log_softmax(-1).gather(-1, sampled.ids[:, None])[:, 0]
    torch.testing.assert_close(sampled.logprobs.double(), chosen, rtol=0, atol=1e-5)


@each_shape
@each_dtype
@pytest.mark.parametrize("rows", [1, 64])
def test_forbidden_tokens_are_masked(shape: Shape, dtype: torch.dtype, rows: int) -> None:
    logits = randn(2 * rows, shape.vocab_size, dtype=dtype)
    masked = torch.randperm(2 * rows, device=CUDA)[:rows]
    words = (rows, -(-shape.vocab_size // 32))
    masks = torch.randint(-(1 << 31), 1 << 31, words, dtype=torch.int32, device=CUDA)
    expected = logits.clone()
    TORCH.mask_tokens(expected, masked, masks)
    TRITON.mask_tokens(logits, masked, masks)
    assert torch.equal(logits, expected)


@each_shape
@each_dtype
@pytest.mark.parametrize(("gamma", "delta"), [(0.5, 2.0), (0.25, 0.3)])
def test_watermark(shape: Shape, dtype: torch.dtype, gamma: float, delta: float) -> None:
    logits = randn(64, shape.vocab_size, dtype=dtype)
    rows = torch.randperm(64, device=CUDA)[:40]
    previous = torch.randint(0, shape.vocab_size, (64,), device=CUDA)
    expected = logits.clone()
    TORCH.watermark(expected, rows, previous, gamma, delta)
    raised = (expected != logits)[rows].float().mean(dim=1)
    assert (raised - gamma).abs().max() < 0.02
    TRITON.watermark(logits, rows, previous, gamma, delta)
    assert torch.equal(logits, expected)


@each_dtype
def test_blocks_are_copied_in_every_layer(dtype: torch.dtype) -> None:
    pools = [randn(4, 60, BLOCK_SIZE, 8, 128, dtype=dtype) for _ in range(2)]
    before = [pool.clone() for pool in pools]
    sources, targets = (torch.tensor(ids, device=CUDA) for ids in ([3, 3, 7], [5, 59, 0]))
    copy_blocks(pools, sources, targets)
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(pool[:, targets], old[:, sources])
        kept = [block for block in range(60) if block not in (5, 59, 0)]
        assert torch.equal(pool[:, kept], old[:, kept])


def test_norm_of_heads_reads_them_where_they_are() -> None:
    qkv = randn(1, 33, 48 * 128, dtype=torch.bfloat16)
    heads = qkv[..., : 32 * 128].view(1, 33, 32, 128)
    weight, form = randn(128, dtype=torch.bfloat16), NormForm(1e-6)
    ours, theirs = TRITON.norm(heads, weight, None, form), norm_torch(heads, weight, None, form)
    assert_close(ours, theirs, factor=1)
