"""How the kernel is compiled and launched for a GPU and a layer's shapes."""

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton

from kernels.paged_attention.mask import NO_LIMIT, MaskSpec
from kernels.target import Target

_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class KernelSpec:
    """The constants that the kernel is compiled with.

    block_m           rows of a tile, padded to a power of two that tensor cores accept
    block_n           keys that a program reads at once
    block_d, block_v  `head_dim` and `value_dim`, padded likewise
    runs              each program takes a run of splits (decode), not one split (prefill)
    is_float8         the caches are float8: keys come as uint8, values as pairs in int16
    as_bits           float8 is decoded by moving bits, as the GPU has no instruction for it
    merge_m, merge_n  rows and splits of partials in flight at once
    factor            turns the product of query and key into a logarithm to base 2
    cap               softcap to base 2; `factor` then makes the argument of exp2 in tanh
    precision         input precision of float32 matrix products
    """

    num_kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    block_size: int
    key_block_stride: int
    key_slot_stride: int
    key_head_stride: int
    value_block_stride: int
    value_slot_stride: int
    value_head_stride: int
    table_stride: int
    block_q: int
    block_m: int
    block_n: int
    block_d: int
    block_v: int
    runs: bool
    is_float8: bool
    as_bits: bool
    merge_m: int
    merge_n: int
    factor: float
    cap: float | None
    window: int | None
    chunk: int | None
    precision: str | None


@dataclass(frozen=True, slots=True)
class Variant:
    """The kernel for the shapes of a layer, and the options to launch it with."""

    spec: KernelSpec
    num_warps: int
    num_stages: int
    max_programs: int


@cache
def variant_for(
    target: Target,
    runs: bool,
    block_q: int,
    dtype: torch.dtype,
    query_shape: tuple[int, int],
    cache_dtype: torch.dtype,
    key_shape: tuple[int, int, int],
    key_strides: tuple[int, int, int, int],
    value_dim: int,
    value_strides: tuple[int, int, int, int],
    table_stride: int,
    mask: MaskSpec,
    scale: float,
    softcap: float | None,
) -> Variant:
    """Choose the variant of the kernel for a GPU and the shapes of a layer.

    runs                    for decodes, not for prefill
    query_shape, key_shape  shapes without the first dimension
    """
    num_heads, head_dim = query_shape
    block_size, num_kv_heads, _ = key_shape
    group = num_heads // num_kv_heads
    block_m = max(triton.next_power_of_2(group * block_q), 16)
    block_d = max(triton.next_power_of_2(head_dim), 16)
    block_v = max(triton.next_power_of_2(value_dim), 16)
    key_bytes = (block_d + block_v) * cache_dtype.itemsize
    query_bytes = block_m * block_d * dtype.itemsize
    if runs:
        other_bytes = query_bytes + block_m * block_v * 4
        block_n, in_flight, per_sm = _decode_tiling(
            target, block_m, key_bytes, cache_dtype.itemsize, other_bytes
        )
        max_programs = target.num_sms * per_sm
        num_warps = 4 if block_m < 64 else 8
    else:
        block_n, in_flight = _prefill_tiling(
            target, block_m, block_v, key_bytes, query_bytes, dtype.itemsize
        )
        num_warps, max_programs = 8, target.num_sms
    merge_m = min(triton.next_power_of_2(group * block_q), 16)
    spec = KernelSpec(
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        value_dim=value_dim,
        block_size=block_size,
        key_block_stride=key_strides[0],
        key_slot_stride=key_strides[1],
        key_head_stride=key_strides[2],
        value_block_stride=value_strides[0],
        value_slot_stride=value_strides[1],
        value_head_stride=value_strides[2],
        table_stride=table_stride,
        block_q=block_q,
        block_m=block_m,
        block_n=block_n,
        block_d=block_d,
        block_v=block_v,
        runs=runs,
        is_float8=cache_dtype == torch.uint8,
        as_bits=cache_dtype == torch.uint8 and target.capability < 89,
        merge_m=merge_m,
        merge_n=_merge_tiling(merge_m * block_v // (num_warps * 32)),
        factor=scale * _LOG2E if softcap is None else 2 * _LOG2E * scale / softcap,
        cap=None if softcap is None else softcap * _LOG2E,
        window=None if mask.window >= NO_LIMIT else mask.window,
        chunk=None if mask.chunk >= NO_LIMIT else mask.chunk,
        precision="ieee" if dtype == torch.float32 else None,
    )
    # Loads of keys and values need block ids, which are loaded as many stages before them.
    return Variant(spec, num_warps, 2 * in_flight + 1, max_programs)


def _decode_tiling(
    target: Target, block_m: int, key_bytes: int, cache_itemsize: int, other_bytes: int
) -> tuple[int, int, int]:
    """Return the keys that a program reads at once, the reads in flight, the programs per SM.

    A read is of 32 KB, with one more in flight: two programs keep the multiprocessor's share of
    the memory bandwidth, some 40 KB a microsecond, busy over the memory's latency. A read of a
    float8 cache is of half of that, as its conversions take registers, with two more in flight
    where there is room.
    """
    # With more keys, conversions or the scores of many heads run out of registers.
    most = 64 if cache_itemsize == 1 or block_m >= 64 else 128
    block_n = min(max(1 << ((32 << 10) // key_bytes).bit_length() - 1, 16), most)
    for in_flight in (3, 2) if cache_itemsize == 1 else (2,):
        needed = in_flight * block_n * (key_bytes + 4) + other_bytes + 1024
        if 2 * needed <= target.shared_bytes + 1024 and block_m < 64:
            return block_n, in_flight, 2
    return block_n, 2, 1


def _merge_tiling(registers: int) -> int:
    """Return the partials in flight at once, of so many registers of a thread each.

    With 16 of Llama's, the assembler of Triton 3.6 spills.
    """
    return min(max(48 // max(registers, 1), 4), 12)


def _prefill_tiling(
    target: Target, block_m: int, block_v: int, key_bytes: int, query_bytes: int, itemsize: int
) -> tuple[int, int]:
    """Return the keys that a program reads at once, and the reads in flight: up to two.

    The matrix units of Hopper and Blackwell read shared memory asynchronously, and so need one
    more buffer. Those of Hopper take the softmax weights from registers, the others from shared
    memory.
    """
    generation = target.capability // 10
    most = {9: 128, 10: 64}.get(generation, 32) if block_v <= 128 else 32  # for registers
    for in_flight in (2, 1):
        for block_n in (128, 64, 32, 16):
            buffers = in_flight + (generation in (9, 10))
            needed = query_bytes + buffers * block_n * key_bytes + 2048
            needed += 0 if generation == 9 else block_m * block_n * itemsize
            if block_n <= most and needed <= target.shared_bytes:
                return block_n, in_flight
    return 16, 0
