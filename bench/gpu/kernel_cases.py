"""The cases in which each kernel is timed alone, at a model's shapes, with their bounds."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from engine.attention.interface import StepMetadata
from engine.attention.kv_cache import AttentionCall
from engine.attention.plan import PADDING, FixedTables, GraphShape, StepSequences, make_planner
from engine.core.config import BLOCK_SIZE
from engine.core.request import SamplingParams
from engine.device.packed_arrays import PackedArrays
from engine.sampling.factory import make_sampler
from kernels.norm import NormForm
from kernels.ops import Ops
from kernels.paged_attention.mask import MaskSpec
from kernels.store_kv import Rotary

_COLD_BYTES = 256 << 20
"""Size of the data that a case alternates over: several times the size of a GPU's cache."""
_MOST_COPIES = 32
_CAPTURED = ((1, 9, 1015, 16), (1, 130, 894, 256), (4, 75, 949, 2048))
"""Captured steps with chunks, as (chunks, length, tokens before, tokens of the graph). Without
decodes: their launch finds nothing to do, which is part of what is measured."""
_FEW_ROWS = 1, 2, 4, 8
_MEDIUM_ROWS = 64, 128, 256


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
    ahead      makes the call of another kernel that each call is timed after, as in a step; its
               own time is subtracted
    num_bytes  bytes that the call must read and write
    size       the sizes to show in the table
    """

    name: str
    make: Callable[[], Callable[[], object]]
    num_bytes: float
    flops: float = 0.0
    size: dict[str, int] = field(default_factory=dict)
    ahead: Callable[[], Callable[[], object]] | None = None


def measure(case: KernelCase, timer: Timer, rates: Rates) -> dict[str, Any]:
    """Return a row of the table.

    Inputs are not in the cache, except those far smaller than the cache, which are in the cache
    in a real step too.
    """
    copies = 1
    if timer.on_cuda:
        copies = int(min(max(-(-_COLD_BYTES // max(case.num_bytes, 1)), 1), _MOST_COPIES))
    calls = [case.make() for _ in range(copies if case.ahead is None else 4)]
    seconds = timer.of(*calls) if case.ahead is None else _seconds_after(case.ahead, calls, timer)
    return {
        "kernel": case.name,
        **case.size,
        "us": seconds * 1e6,
        "mb": case.num_bytes / 1e6,
        "gb_per_s": case.num_bytes / seconds / 1e9,
        "tflops": case.flops / seconds / 1e12,
        "ratio": rates.seconds(case.num_bytes, case.flops) / seconds,
    }


def _seconds_after(
    make_ahead: Callable[[], Callable[[], object]], calls: list[Callable[[], object]], timer: Timer
) -> float:
    """Return what each call adds to the time of the call ahead of it; at least a nanosecond."""
    ahead = [make_ahead() for _ in calls]
    alone = timer.of(*ahead)
    both = 2 * timer.of(*[call for pair in zip(ahead, calls, strict=True) for call in pair])
    return max(both - alone, 1e-9)


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
            *[decode_attention(setting, batch, contexts[0], is_float8=True) for batch in batches],
            *[prefill_attention(setting, *prompt) for prompt in prompts],
            *(captured_attention(setting, *step) for step in _CAPTURED if setting.ops.is_triton),
        ],
        "GEMM": [case for batch in batches for case in matmuls(setting, batch)],
        "GEMV": [case for rows in _FEW_ROWS for case in few_rows(setting, rows)],
        "cuBLASLt": [case for rows in _MEDIUM_ROWS for case in by_cublaslt(setting, rows)],
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


def cold_add_norm(setting: Setting, batch: int) -> KernelCase:
    """The norm after the product ahead of it in a step, whose weights fill the cache."""
    shape = setting.shape

    def ahead() -> Callable[[], object]:
        x = setting.randn(batch, shape.intermediate)
        return partial(F.linear, x, setting.randn(shape.hidden, shape.intermediate))

    warm = add_norm(setting, batch)
    return replace(warm, name="add_norm, cold weight", ahead=ahead)


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


def decode_attention(
    setting: Setting, batch: int, context: int, is_float8: bool = False
) -> KernelCase:
    name = "decode attention, fp8 cache" if is_float8 else "decode attention"
    size = {"batch": batch, "context": context}
    return _attention(name, setting, _uniform(batch, 1, context - 1), size, is_float8)


def prefill_attention(setting: Setting, batch: int, length: int, before: int) -> KernelCase:
    size = {"batch": batch, "context": before + length, "tokens": length}
    return _attention("prefill attention", setting, _uniform(batch, length, before), size)


def captured_attention(
    setting: Setting, batch: int, length: int, before: int, num_rows: int
) -> KernelCase:
    """Attention of chunks in a captured step of `num_rows` tokens, which the padding fills."""
    step, graph = _uniform(batch, length, before), GraphShape(num_rows, num_rows, prefills=True)
    size = {"batch": batch, "context": before + length, "tokens": length, "rows": num_rows}
    return _attention("captured attention", setting, step, size, graph=graph)


def _uniform(batch: int, length: int, before: int) -> StepSequences:
    ones = np.ones(batch, dtype=np.int64)
    return StepSequences(np.arange(batch), ones * before, ones * length)


def _attention(
    name: str,
    setting: Setting,
    step: StepSequences,
    size: dict[str, int],
    is_float8: bool = False,
    graph: GraphShape | None = None,
) -> KernelCase:
    work = attention_work(setting, step, is_float8)
    make = partial(_make_attention, setting, step, is_float8, graph)
    return KernelCase(name, make, work.num_bytes, work.flops, size)


def attention_work(setting: Setting, step: StepSequences, is_float8: bool = False) -> Work:
    """Return the work: queries read, outputs written, and every visible key and value once."""
    shape, itemsize, mask = setting.shape, setting.dtype.itemsize, MaskSpec()
    cost, num_tokens = Attention.of(_call(shape), itemsize), int(step.lengths.sum())
    token_bytes = Attention.of(_call(shape), 1).token_bytes if is_float8 else cost.token_bytes
    in_and_out = num_tokens * cost.num_heads * cost.dims * itemsize
    return Work(
        seconds=0.0,
        num_bytes=in_and_out + int(step.ends.sum()) * token_bytes,
        flops=2.0 * int(visible(mask, step.positions).sum()) * cost.num_heads * cost.dims,
    )


def _call(shape: KernelShape) -> AttentionCall:
    dim = shape.head_dim
    heads = shape.num_heads, shape.num_kv_heads
    return AttentionCall(torch.nn.Identity(), *heads, dim, dim, MaskSpec())


def _make_attention(
    setting: Setting, step: StepSequences, is_float8: bool, graph: GraphShape | None
) -> Callable[[], object]:
    """Make an attention call over a cache with shuffled blocks."""
    shape, num_sequences, dim = setting.shape, len(step.slots), setting.shape.head_dim
    width = -(-int(step.ends.max()) // BLOCK_SIZE)
    tables = np.random.default_rng(0).permutation(num_sequences * width)
    tables = tables.reshape(num_sequences, width)
    num_rows = int(step.lengths.sum()) if graph is None else graph.tokens
    if graph is None:
        fixed = FixedTables(setting.ops, [_call(shape)], tables, setting.device)
        metadata = fixed.metadata(step)
    else:
        metadata = _captured_metadata(setting, step, tables, graph)
    cache = num_sequences * width, BLOCK_SIZE, shape.num_kv_heads, dim
    keys, values = setting.randn(*cache), setting.randn(*cache)
    scale = None
    if is_float8:
        keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
        scale = torch.ones(shape.num_kv_heads, device=setting.device)
    query = setting.randn(num_rows, shape.num_heads, dim)
    attend = partial(setting.ops.paged_attention, query, keys, values, metadata, MaskSpec())
    return partial(attend, scale=dim**-0.5, k_scale=scale, v_scale=scale)


def _captured_metadata(
    setting: Setting, step: StepSequences, tables: np.ndarray, graph: GraphShape
) -> StepMetadata:
    """Plan a step as the engine does for a graph: padded, in a buffer with room for any other."""
    tables = np.concatenate([tables, np.zeros_like(tables[:1])])  # with the slot of padding
    num_padding = graph.tokens - int(step.lengths.sum())
    padded = StepSequences(
        np.append(step.slots, np.full(num_padding, len(step.slots))),
        np.append(step.starts, np.full(num_padding, PADDING)),
        np.append(step.lengths, np.ones(num_padding, dtype=np.int64)),
    )
    shape = tables.shape[0], tables.shape[1]
    planner = make_planner(setting.ops, [_call(setting.shape)], shape, graph.tokens, setting.device)
    update = planner.update(np.arange(tables.size), tables.reshape(-1))
    if update:
        planner.apply_update(PackedArrays(update).upload(setting.device))
    plan = planner.plan(padded, tables, graph)
    slot_mapping = np.full(graph.tokens, -1)
    arrays = PackedArrays({"slot_mapping": slot_mapping} | plan.arrays, plan.capacity)
    buffer = torch.zeros(arrays.max_bytes, dtype=torch.uint8, device=setting.device)
    arrays.copy_to(buffer)
    return planner.metadata(arrays.unpack(buffer), plan.host_arrays)


# -- sampling ------------------------------------------------------------------------------


def greedy(setting: Setting, batch: int) -> KernelCase:
    return _sampling("greedy", setting, batch, SamplingParams())


def sample(setting: Setting, batch: int) -> KernelCase:
    return _sampling("sample", setting, batch, SamplingParams(do_sample=True, temperature=0.7))


def sample_top_p(setting: Setting, batch: int) -> KernelCase:
    """Sample from random logits, which are harder than those of a trained model."""
    params = SamplingParams(do_sample=True, temperature=0.7, top_k=50, top_p=0.9)
    return _sampling("sample, top-k and top-p", setting, batch, params)


def sample_top_p_of_frequent_tokens(setting: Setting, batch: int) -> KernelCase:
    """Sample from logits that are higher for frequent tokens, which vocabularies list first."""
    params = SamplingParams(do_sample=True, temperature=0.7, top_k=50, top_p=0.9)
    name = "sample, top-k and top-p of frequent tokens"
    return _sampling(name, setting, batch, params, fall=0.3)


def sample_typical(setting: Setting, batch: int) -> KernelCase:
    """Sample by a threshold that needs the whole row, which is left to the third pass."""
    params = SamplingParams(do_sample=True, temperature=0.7, typical_p=0.9)
    return _sampling("sample, typical-p", setting, batch, params)


def _sampling(
    name: str, setting: Setting, batch: int, params: SamplingParams, fall: float = 0.0
) -> KernelCase:
    """Return a case with random logits; they fall by `fall` while ids rise by a factor of e."""
    vocab_size, device = setting.shape.vocab_size, setting.device
    falling = -fall * torch.arange(1, vocab_size + 1, device=device).log().to(setting.dtype)

    def make() -> Callable[[], object]:
        sampler = make_sampler(setting.ops, batch, vocab_size, device, max_top_tokens=0)
        for slot in range(batch):
            sampler.set_parameters(slot, params)
        plan = sampler.plan(np.arange(batch), np.full(batch, 100))
        uploaded = {name: torch.from_numpy(a).to(device) for name, a in plan.arrays.items()}
        logits = setting.randn(batch, vocab_size) + falling
        return partial(sampler.sample, logits, uploaded, plan.kind)

    num_bytes = batch * vocab_size * setting.dtype.itemsize
    return KernelCase(name, make, num_bytes, size={"batch": batch})


_OF_A_STEP = (norm, add_norm, cold_add_norm, act_mul, rotary_store_kv)
_OF_SAMPLING = (
    greedy,
    sample,
    sample_top_p,
    sample_top_p_of_frequent_tokens,
    sample_typical,
)


# -- matrix products -----------------------------------------------------------------------


def matmuls(setting: Setting, batch: int) -> list[KernelCase]:
    """Return the library's matrix products, which take most of a step, and on a GPU beside them
    those of --batch-invariant.
    """
    library = _matmuls("GEMM", F.linear, setting, batch)
    if not setting.ops.is_triton:
        return library
    invariant = partial(setting.ops.invariant_linear, bias=None)
    return [*library, *_matmuls("GEMM, batch-invariant", invariant, setting, batch)]


def few_rows(setting: Setting, rows: int) -> list[KernelCase]:
    """Return our own kernel for few rows beside the library's product."""
    library = _matmuls("few rows, library:", F.linear, setting, rows)
    return [*library, *_matmuls("few rows, our own:", setting.ops.gemv, setting, rows)]


def by_cublaslt(setting: Setting, rows: int) -> list[KernelCase]:
    """Return the library's product as it is and by cuBLASLt, which torch uses only if told to."""
    default = _matmuls("as it is:", F.linear, setting, rows)
    if setting.device.type != "cuda":
        return default
    return [*default, *_matmuls("cuBLASLt:", _by_cublaslt, setting, rows)]


def _by_cublaslt(x: Tensor, weight: Tensor) -> Tensor:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        return F.linear(x, weight)
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def _matmuls(
    name: str, linear: Callable[..., Tensor], setting: Setting, rows: int
) -> list[KernelCase]:
    shape = setting.shape
    sizes = {
        "q, k, v": (shape.hidden, shape.qkv),
        "attention out": (shape.num_heads * shape.head_dim, shape.hidden),
        "gate, up": (shape.hidden, 2 * shape.intermediate),
        "down": (shape.intermediate, shape.hidden),
        "logits": (shape.hidden, shape.vocab_size),
    }
    return [_matmul(f"{name} {of}", linear, setting, rows, *size) for of, size in sizes.items()]


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
