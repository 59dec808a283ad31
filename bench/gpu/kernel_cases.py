"""The cases in which each kernel is timed alone, at a model's shapes, with their bounds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.bounds import (
    Attention,
    Rates,
    Work,
    visible,
)
from bench.gpu.device import Timer
from bench.gpu.skinny_linear import MAX_ROWS, skinny_linear
from engine.attention.kv_cache import AttentionCall
from engine.attention.plan import FixedTables, StepSequences
from engine.core.config import BLOCK_SIZE
from engine.core.request import SamplingParams
from engine.sampling.factory import make_sampler
from kernels.norm import NormForm
from kernels.ops import Ops
from kernels.paged_attention.mask import MaskSpec
from kernels.store_kv import Rotary

_COLD_BYTES = 256 << 20
"""Size of the data that a case alternates over: several times the size of a GPU's cache."""
_MOST_COPIES = 32


@dataclass(frozen=True, slots=True)
class KernelShape:
    """The shapes of one model's layers."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def qkv(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


LLAMA_8B = KernelShape(4096, 14336, 32, 8, 128, 128256)


@dataclass(frozen=True, slots=True)
class Setting:
    """Which kernels run, on which device, and at which shapes."""

    shape: KernelShape
    device: torch.device
    dtype: torch.dtype
    ops: Ops

    def randn(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class KernelCase:
    """A kernel at some size.

    make       makes a call on new data; the call may be repeated
    num_bytes  bytes that the call must read and write
    size       the sizes to show in the table
    """

    name: str
    make: Callable[[], Callable[[], object]]
    num_bytes: float
    flops: float = 0.0
    size: dict[str, int] = field(default_factory=dict)


def measure(case: KernelCase, timer: Timer, rates: Rates) -> dict[str, Any]:
    """Return a row of the table.

    Inputs are not in the cache, except those far smaller than the cache, which are in the cache
    in a real step too.
    """
    copies = 1
    if timer.on_cuda:
        copies = int(min(max(-(-_COLD_BYTES // max(case.num_bytes, 1)), 1), _MOST_COPIES))
    seconds = timer.of(*[case.make() for _ in range(copies)])
    return {
        "kernel": case.name,
        **case.size,
        "us": seconds * 1e6,
        "mb": case.num_bytes / 1e6,
        "gb_per_s": case.num_bytes / seconds / 1e9,
        "tflops": case.flops / seconds / 1e12,
        "ratio": rates.seconds(case.num_bytes, case.flops) / seconds,
    }


def cases(
    setting: Setting,
    batches: tuple[int, ...],
    contexts: tuple[int, ...],
    prompts: tuple[tuple[int, int, int], ...],
) -> dict[str, list[KernelCase]]:
    """Return the cases by kind: decode steps at each batch, and attention of prompts.

    prompts  (batch, length, tokens before)
    """
    return {
        "attention": [
            *[
                decode_attention(setting, batch, context)
                for context in contexts
                for batch in batches
            ],
            *[prefill_attention(setting, *prompt) for prompt in prompts],
        ],
        "GEMM": [case for batch in batches for case in matmuls(setting, batch)],
        "step": [make(setting, batch) for make in _OF_A_STEP for batch in batches],
        "sampling": [make(setting, batch) for make in _OF_SAMPLING for batch in batches],
    }


# -- around attention ----------------------------------------------------------------------


def norm(setting: Setting, batch: int) -> KernelCase:
    hidden, itemsize = setting.shape.hidden, setting.dtype.itemsize

    def make() -> Callable[[], object]:
        x, weight = setting.randn(batch, hidden), setting.randn(hidden)
        return partial(setting.ops.norm, x, weight, None, NormForm(1e-5))

    return KernelCase("norm", make, 2 * batch * hidden * itemsize, size={"batch": batch})


def add_norm(setting: Setting, batch: int) -> KernelCase:
    hidden, itemsize = setting.shape.hidden, setting.dtype.itemsize

    def make() -> Callable[[], object]:
        x, residual = setting.randn(2, batch, hidden)
        weight = setting.randn(hidden)
        return partial(setting.ops.add_norm, x, residual, weight, None, NormForm(1e-5))

    return KernelCase("add_norm", make, 4 * batch * hidden * itemsize, size={"batch": batch})


def act_mul(setting: Setting, batch: int) -> KernelCase:
    intermediate, itemsize = setting.shape.intermediate, setting.dtype.itemsize

    def make() -> Callable[[], object]:
        gate, up = setting.randn(batch, 2 * intermediate).chunk(2, dim=-1)
        return partial(setting.ops.act_mul, gate, up, "silu")

    return KernelCase("act_mul", make, 3 * batch * intermediate * itemsize, size={"batch": batch})


def rotary_store_kv(setting: Setting, batch: int) -> KernelCase:
    shape, itemsize = setting.shape, setting.dtype.itemsize
    heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]

    def make() -> Callable[[], object]:
        qkv = setting.randn(batch, sum(heads), shape.head_dim)
        cos, sin = setting.randn(2, batch, shape.head_dim)
        keys, values = setting.randn(2, batch, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
        slots = torch.arange(batch, device=setting.device) * BLOCK_SIZE
        rotary = Rotary(cos, sin, interleaved=False)
        query, key, value = qkv.split(heads, dim=1)
        store = setting.ops.rotary_store_kv
        return partial(store, query, key, value, rotary, keys, values, slots)

    num_bytes = 2 * batch * (shape.qkv + shape.head_dim) * itemsize
    return KernelCase("rotary_store_kv", make, num_bytes, size={"batch": batch})


# -- attention -----------------------------------------------------------------------------


def decode_attention(setting: Setting, batch: int, context: int) -> KernelCase:
    size = {"batch": batch, "context": context}
    return _attention("decode attention", setting, batch, 1, context - 1, size)


def prefill_attention(setting: Setting, batch: int, length: int, before: int) -> KernelCase:
    size = {"batch": batch, "context": before + length, "tokens": length}
    return _attention("prefill attention", setting, batch, length, before, size)


def _attention(
    name: str, setting: Setting, batch: int, length: int, before: int, size: dict[str, int]
) -> KernelCase:
    ones = np.ones(batch, dtype=np.int64)
    step = StepSequences(np.arange(batch), ones * before, ones * length)
    work = attention_work(setting, step)
    make = partial(_make_attention, setting, step)
    return KernelCase(name, make, work.num_bytes, work.flops, size)


def attention_work(setting: Setting, step: StepSequences) -> Work:
    """Return the work: queries read, outputs written, and every visible key and value once."""
    shape, itemsize, mask = setting.shape, setting.dtype.itemsize, MaskSpec()
    cost, num_tokens = Attention.of(_call(shape), itemsize), int(step.lengths.sum())
    in_and_out = num_tokens * cost.num_heads * cost.dims * itemsize
    return Work(
        seconds=0.0,
        num_bytes=in_and_out + int(step.ends.sum()) * cost.token_bytes,
        flops=2.0 * int(visible(mask, step.positions).sum()) * cost.num_heads * cost.dims,
    )


def _call(shape: KernelShape) -> AttentionCall:
    dim = shape.head_dim
    heads = shape.num_heads, shape.num_kv_heads
    return AttentionCall(torch.nn.Identity(), *heads, dim, dim, MaskSpec())


def _make_attention(setting: Setting, step: StepSequences) -> Callable[[], object]:
    """Make an attention call over a cache with shuffled blocks."""
    shape, num_sequences, dim = setting.shape, len(step.slots), setting.shape.head_dim
    width = -(-int(step.ends.max()) // BLOCK_SIZE)
    tables = np.random.default_rng(0).permutation(num_sequences * width)
    tables = tables.reshape(num_sequences, width)
    metadata = FixedTables(setting.ops, [_call(shape)], tables, setting.device).metadata(step)
    cache = num_sequences * width, BLOCK_SIZE, shape.num_kv_heads, dim
    keys, values = setting.randn(*cache), setting.randn(*cache)
    query = setting.randn(int(step.lengths.sum()), shape.num_heads, dim)
    attend = setting.ops.paged_attention
    return partial(attend, query, keys, values, metadata, MaskSpec(), scale=dim**-0.5)


# -- sampling ------------------------------------------------------------------------------


def greedy(setting: Setting, batch: int) -> KernelCase:
    return _sampling("greedy", setting, batch, SamplingParams())


def sample(setting: Setting, batch: int) -> KernelCase:
    return _sampling("sample", setting, batch, SamplingParams(do_sample=True, temperature=0.7))


def sample_top_p(setting: Setting, batch: int) -> KernelCase:
    """Sample from random logits, which are harder than those of a trained model."""
    params = SamplingParams(do_sample=True, temperature=0.7, top_k=50, top_p=0.9)
    return _sampling("sample, top-k and top-p", setting, batch, params)


def _sampling(name: str, setting: Setting, batch: int, params: SamplingParams) -> KernelCase:
    vocab_size, device = setting.shape.vocab_size, setting.device

    def make() -> Callable[[], object]:
        sampler = make_sampler(setting.ops, batch, vocab_size, device)
        for slot in range(batch):
            sampler.set_parameters(slot, params)
        plan = sampler.plan(np.arange(batch), np.full(batch, 100))
        uploaded = {name: torch.from_numpy(a).to(device) for name, a in plan.arrays.items()}
        return partial(sampler.sample, setting.randn(batch, vocab_size), uploaded, plan.kind)

    num_bytes = batch * vocab_size * setting.dtype.itemsize
    return KernelCase(name, make, num_bytes, size={"batch": batch})


_OF_A_STEP = (norm, add_norm, act_mul, rotary_store_kv)
_OF_SAMPLING = (greedy, sample, sample_top_p)


# -- matrix products -----------------------------------------------------------------------


def matmuls(setting: Setting, batch: int) -> list[KernelCase]:
    """Return the library's matrix products, which take most of a step.

    For few rows there is also a kernel of our own, a candidate to replace them. The products of
    --batch-invariant are beside them.
    """
    shape = setting.shape
    sizes = {
        "GEMM q, k, v": (shape.hidden, shape.qkv),
        "GEMM attention out": (shape.num_heads * shape.head_dim, shape.hidden),
        "GEMM gate, up": (shape.hidden, 2 * shape.intermediate),
        "GEMM down": (shape.intermediate, shape.hidden),
        "GEMM logits": (shape.hidden, shape.vocab_size),
    }
    by: dict[str, Callable[..., Tensor]] = {"": F.linear}
    if batch <= MAX_ROWS and setting.ops.is_triton:
        by[", candidate"] = skinny_linear
    if setting.ops.is_triton:
        by[", batch-invariant"] = partial(setting.ops.invariant_linear, bias=None)
    return [
        _matmul(name + suffix, linear, setting, batch, *size)
        for name, size in sizes.items()
        for suffix, linear in by.items()
    ]


def _matmul(
    name: str,
    linear: Callable[..., Tensor],
    setting: Setting,
    batch: int,
    num_in: int,
    num_out: int,
) -> KernelCase:
    def make() -> Callable[[], object]:
        return partial(linear, setting.randn(batch, num_in), setting.randn(num_out, num_in))

    num_bytes = (num_in * num_out + batch * (num_in + num_out)) * setting.dtype.itemsize
    return KernelCase(name, make, num_bytes, 2.0 * batch * num_in * num_out, {"batch": batch})
