"""Each kernel alone at the shapes of Llama-3.1-8B, with what it has to move and compute."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention_plan import FixedTables, StepSequences
from engine.config import BLOCK_SIZE
from engine.kv_cache import AttentionCall
from kernels.norm import NormForm
from kernels.ops import ops_for
from kernels.paged_attention import MaskSpec
from kernels.sampling import ROW_PARAMETERS
from kernels.store_kv import Rotary

HIDDEN, INTERMEDIATE, VOCAB = 4096, 14336, 128256
HEADS, KV_HEADS, DIM = 32, 8, 128
CONTEXT = 1024
"""Tokens that each decode attends to; a prefill's prompts are as long."""


@dataclass(frozen=True, slots=True)
class KernelCase:
    """A call, the bytes that it must read and write, and its floating-point operations."""

    work: Callable[[], object]
    num_bytes: float
    flops: float = 0.0


def _randn(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def norm(rows: int, device: torch.device, dtype: torch.dtype) -> KernelCase:
    x, weight = (_randn(n, HIDDEN, device=device, dtype=dtype) for n in (rows, 1))
    form, ops = NormForm(1e-5), ops_for(device)
    return KernelCase(lambda: ops.norm(x, weight[0], None, form), 2 * x.nbytes)


def add_norm(rows: int, device: torch.device, dtype: torch.dtype) -> KernelCase:
    x, residual, weight = (_randn(n, HIDDEN, device=device, dtype=dtype) for n in (rows, rows, 1))
    form, ops = NormForm(1e-5), ops_for(device)
    return KernelCase(lambda: ops.add_norm(x, residual, weight[0], None, form), 4 * x.nbytes)


def act_mul(rows: int, device: torch.device, dtype: torch.dtype) -> KernelCase:
    both = _randn(rows, 2 * INTERMEDIATE, device=device, dtype=dtype)
    gate, up = both.chunk(2, dim=-1)
    ops = ops_for(device)
    return KernelCase(lambda: ops.act_mul(gate, up, "silu"), 1.5 * both.nbytes)


def rotary_store_kv(rows: int, device: torch.device, dtype: torch.dtype) -> KernelCase:
    qkv = _randn(rows, HEADS + 2 * KV_HEADS, DIM, device=device, dtype=dtype)
    query, key, value = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    cos, sin = _randn(2, rows, DIM, device=device, dtype=dtype)
    rotary = Rotary(cos, sin, interleaved=False)
    blocks = -(-rows // BLOCK_SIZE)
    caches = [_randn(blocks, BLOCK_SIZE, KV_HEADS, DIM, device=device, dtype=dtype) for _ in "kv"]
    slots, ops = torch.arange(rows, device=device), ops_for(device)
    return KernelCase(
        lambda: ops.rotary_store_kv(query, key, value, rotary, *caches, slots), 2 * qkv.nbytes
    )


def _attention(
    sequences: StepSequences, device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    width = -(-int(sequences.ends.max()) // BLOCK_SIZE)
    num = len(sequences.slots)
    tables = np.random.default_rng(0).permutation(num * width).reshape(num, width)
    call = AttentionCall(torch.nn.Identity(), HEADS, KV_HEADS, DIM, DIM, MaskSpec())
    ops = ops_for(device)
    metadata = FixedTables(ops, [call], tables, device).metadata(sequences)
    shape = num * width, BLOCK_SIZE, KV_HEADS, DIM
    keys, values = (_randn(*shape, device=device, dtype=dtype) for _ in range(2))
    query = _randn(int(sequences.lengths.sum()), HEADS, DIM, device=device, dtype=dtype)
    return lambda: ops.paged_attention(query, keys, values, metadata, MaskSpec(), DIM**-0.5)


def decode_attention(rows: int, device: torch.device, dtype: torch.dtype) -> KernelCase:
    one = np.ones(rows, dtype=np.int64)
    work = _attention(StepSequences(np.arange(rows), one * (CONTEXT - 1), one), device, dtype)
    flops = 4.0 * rows * CONTEXT * HEADS * DIM
    return KernelCase(work, 2 * rows * CONTEXT * KV_HEADS * DIM * dtype.itemsize, flops)


def prefill_attention(rows: int, device: torch.device, dtype: torch.dtype) -> KernelCase:
    """A sixteenth as many prompts as there are rows elsewhere."""
    num = max(1, rows // 16)
    lengths = np.full(num, CONTEXT)
    work = _attention(StepSequences(np.arange(num), lengths * 0, lengths), device, dtype)
    tokens = num * CONTEXT
    num_bytes = 2 * tokens * (HEADS + KV_HEADS) * DIM * dtype.itemsize
    return KernelCase(work, num_bytes, 2.0 * tokens * CONTEXT * HEADS * DIM)


def greedy(rows: int, device: torch.device, dtype: torch.dtype) -> KernelCase:
    logits = _randn(rows, VOCAB, device=device, dtype=dtype)
    if device.type != "cuda":
        return KernelCase(lambda: logits.argmax(-1), logits.nbytes)
    from kernels import fused_sampling

    return KernelCase(lambda: fused_sampling.greedy(logits, False), logits.nbytes)


def sample(rows: int, device: torch.device, dtype: torch.dtype) -> KernelCase:
    """Temperature, top-k and top-p, as a chat asks for."""
    logits = _randn(rows, VOCAB, device=device, dtype=dtype)
    if device.type != "cuda":
        return KernelCase(lambda: logits.float().softmax(-1).cumsum(-1), logits.nbytes)
    from kernels import fused_sampling

    parameters = np.zeros(rows, dtype=ROW_PARAMETERS)
    for name, value in {
        "temperature": 0.7,
        "top_k": 50,
        "top_p": 0.9,
        "typical_p": 1.0,
        "repetition_penalty": 1.0,
        "do_sample": 1,
    }.items():
        parameters[name] = value
    words = torch.from_numpy(parameters.view(np.int32).reshape(rows, -1)).to(device)
    return KernelCase(lambda: fused_sampling.sample(logits, words, None, 0), logits.nbytes)


KERNELS: dict[str, Callable[[int, torch.device, torch.dtype], KernelCase]] = {
    kernel.__name__: kernel
    for kernel in (
        norm,
        add_norm,
        act_mul,
        rotary_store_kv,
        decode_attention,
        prefill_attention,
        greedy,
        sample,
    )
}
