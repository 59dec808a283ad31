"""Rotate queries and keys to their positions, and write keys and values to the paged cache.

Each key and value of a step is read once, where the projection left it, rotated, rounded to the
type of the cache and written to its slot.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import dependent_launch, wait_for_kernel_ahead

_E4M3_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Rotary:
    """The rotary embedding of a step's tokens, in the tables that the model made.

    The first dimensions of a head form pairs, each rotated by its own angle; dimensions past
    the last pair are left alone. Model families differ in how they pair dimensions and lay out
    the tables:

                            pairs             tables      arithmetic
        most                (i, i + pairs)    "halves"    by type
        olmo*, lfm3         (i, i + pairs)    "halves"    float32, as the tables are
        glm, glm4, helium   (2i, 2i + 1)      "halves"    by type
        ernie4_5            (2i, 2i + 1)      "halves"    float32, as the tables are
        cohere*             (2i, 2i + 1)      "repeated"  float32, the tables are not
        blt                 (2i, 2i + 1)      "repeated"  by type
        gpt_oss             (i, i + pairs)    "pairs"     by type
        gptj, codegen       (2i, 2i + 1)      "pairs"     by type

    "By type" means that each product and their sum are rounded to the type to which torch
    promotes the types of the vectors and the tables, and the result to the vectors' type.

    cos, sin     [num_tokens, columns], any strides, the same for both
    interleaved  pairs are neighbours
    tables       "halves": all pairs, then all pairs again; "repeated": each pair twice in a
                 row; "pairs": each pair once
    in_float32   the arithmetic is float32 whatever the types
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool
    tables: Literal["halves", "repeated", "pairs"] = "halves"
    in_float32: bool = False

    @property
    def num_pairs(self) -> int:
        columns = self.cos.shape[-1]
        return columns if self.tables == "pairs" else columns // 2

    def by_dim(self, table: Tensor) -> Tensor:
        """Return `cos` or `sin` of each rotated dimension, [num_tokens, 2 * num_pairs]."""
        if self.tables == ("repeated" if self.interleaved else "halves"):
            return table
        pairs = table[:, ::2] if self.tables == "repeated" else table[:, : self.num_pairs]
        return pairs.repeat_interleave(2, -1) if self.interleaved else pairs.repeat(1, 2)


def store_kv_torch(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Scatter `key` and `value` into the caches, in place.

    key               [num_tokens, num_kv_heads, head_dim], any strides
    value             [num_tokens, num_kv_heads, value_dim], any strides
    key_cache         [num_blocks, block_size, num_kv_heads, head_dim], contiguous
    value_cache       [num_blocks, block_size, num_kv_heads, value_dim], contiguous
    slot_mapping      [num_tokens] int64: block * block_size + offset of each token; a token
                      with a negative slot is not stored
    k_scale, v_scale  [num_kv_heads] float32, if the caches are float8_e4m3fn: they then hold
                      key / k_scale, saturated at 448 and rounded to nearest even
    """
    # On a GPU this question would wait for the device.
    every = slot_mapping.is_cpu and bool((slot_mapping >= 0).all())
    for source, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        flat = cache.flatten(0, 1)
        if scale is not None:  # torch cannot copy float8 by index, but can copy bytes
            flat, source = flat.view(torch.uint8), _to_e4m3(source, scale).view(torch.uint8)
        if every:
            flat.index_copy_(0, slot_mapping, source)
        else:
            _store_some(source, flat, slot_mapping)


def _store_some(source: Tensor, flat: Tensor, slot_mapping: Tensor) -> None:
    """Store the rows that have a slot, without waiting for the device.

    A row without a slot repeats the row with the highest slot, which is then stored twice. If
    no row has a slot, all rows write back what the first slot holds.
    """
    order = torch.arange(len(slot_mapping), device=slot_mapping.device)
    rows = torch.where(slot_mapping < 0, slot_mapping.argmax(), order)
    slots = slot_mapping[rows]
    stored = torch.where(slots[:, None, None] < 0, flat[:1], source[rows])
    flat.index_copy_(0, slots.clamp(min=0), stored)


def _to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale[:, None]).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate `x`, [num_tokens, heads, dim] with any strides; the result is contiguous."""
    dims = 2 * rotary.num_pairs
    turned = x[..., :dims].float() if rotary.in_float32 else x[..., :dims]
    if rotary.interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        partner = torch.cat((-second, first), dim=-1)
    cos, sin = (rotary.by_dim(table).unsqueeze(1) for table in (rotary.cos, rotary.sin))
    turned = (turned * cos + partner * sin).to(x.dtype)
    if dims < x.shape[-1]:
        return torch.cat((turned, x[..., dims:]), dim=-1)
    return turned.contiguous()


def rotary_store_kv_torch(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    rotary: Rotary,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Return the rotated query, and store the rotated key and the value in the caches.

    The result is [num_tokens, num_heads, head_dim], contiguous. Other arguments are as in
    `store_kv_torch`.

    query       [num_tokens, num_heads, head_dim], any strides
    key, value  both None if the layer reads the cache of an earlier layer
    """
    if key is not None and value is not None:
        key = rotate(key, rotary)
        store_kv_torch(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)
    return rotate(query, rotary)


def store_kv_triton(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Do what `store_kv_torch` does, if the last dimension of key and value is contiguous.

    Reads each key and value once and writes it once, in the type of the cache.
    """
    caches = key_cache, value_cache
    _launch(None, None, key, value, None, *caches, slot_mapping, k_scale, v_scale)


def rotary_store_kv_triton(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    rotary: Rotary,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Do what `rotary_store_kv_torch` does, in one launch.

    The last dimension of query, key and value must be contiguous; the tables may have any
    strides. Reads query, key and value once, and writes each once, keys and values in the type
    of the cache. Rows of the tables come from the L2 cache for all heads but the first.
    """
    rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    caches = key_cache, value_cache
    _launch(query, rotated, key, value, rotary, *caches, slot_mapping, k_scale, v_scale)
    return rotated


def _launch(
    query: Tensor | None,
    rotated: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    rotary: Rotary | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    if k_scale is not None:
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
    head_dim = key_cache.shape[-1]
    num_heads = 0 if query is None else query.shape[1]
    num_kv_heads = 0 if key is None else key.shape[1]
    # Two warps with 16 bytes for each thread make many programs even of few tokens.
    heads_per_program = max(1, 1024 // triton.next_power_of_2(head_dim))
    query_programs = triton.cdiv(num_heads, heads_per_program)
    kv_programs = triton.cdiv(num_kv_heads, heads_per_program)
    _rotary_store_kv_kernel[(len(slot_mapping) * (query_programs + 2 * kv_programs),)](
        *_with_strides(query),
        rotated,
        *_with_strides(key),
        *_with_strides(value),
        *_tables(rotary),
        key_cache,
        value_cache,
        slot_mapping,
        k_scale,
        v_scale,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_cache.shape[-1],
        PAIRS=0 if rotary is None else rotary.num_pairs,
        INTERLEAVED=rotary is not None and rotary.interleaved,
        IN_FLOAT32=rotary is not None and rotary.in_float32,
        HEADS=heads_per_program,
        QUERY_PROGRAMS=query_programs,
        KV_PROGRAMS=kv_programs,
        num_warps=2,
        # transformers rounds each product, which fusing it with the sum would skip.
        enable_fp_fusion=False,
        **dependent_launch(slot_mapping.device),
    )


def _with_strides(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    if x is None:
        return None, 0, 0
    assert x.stride(2) == 1
    return x, x.stride(0), x.stride(1)


def _tables(rotary: Rotary | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    if rotary is None:
        return None, None, 0, 0
    assert rotary.cos.stride() == rotary.sin.stride()
    token_stride, column_stride = rotary.cos.stride()
    pair_stride = column_stride * (2 if rotary.tables == "repeated" else 1)
    return rotary.cos, rotary.sin, token_stride, pair_stride


@triton.jit
def _rotary_store_kv_kernel(
    query_ptr,
    query_token_stride,
    query_head_stride,
    rotated_ptr,
    key_ptr,
    key_token_stride,
    key_head_stride,
    value_ptr,
    value_token_stride,
    value_head_stride,
    cos_ptr,
    sin_ptr,
    table_token_stride,
    table_pair_stride,
    key_cache_ptr,
    value_cache_ptr,
    slot_ptr,
    k_scale_ptr,
    v_scale_ptr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    HEADS: tl.constexpr,
    QUERY_PROGRAMS: tl.constexpr,
    KV_PROGRAMS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Move some heads of one token: of its query, of its key or of its value."""
    programs: tl.constexpr = QUERY_PROGRAMS + 2 * KV_PROGRAMS
    program = tl.program_id(0) % programs
    token = (tl.program_id(0) // programs).to(tl.int64)
    cos = None
    sin = None
    if PAIRS > 0:
        cos, sin = cos_ptr + token * table_token_stride, sin_ptr + token * table_token_stride

    wait_for_kernel_ahead(DEPENDENT)
    if query_ptr is not None:  # noqa: SIM102 (this is decided when compiling, the next when running)
        if program < QUERY_PROGRAMS:
            heads = program * HEADS + tl.arange(0, HEADS).to(tl.int64)[:, None]
            _move_heads(
                query_ptr + token * query_token_stride + heads * query_head_stride,
                rotated_ptr + (token * NUM_HEADS + heads) * HEAD_DIM,
                heads < NUM_HEADS,
                None,
                0,
                None,
                cos,
                sin,
                table_pair_stride,
                HEAD_DIM,
                PAIRS,
                INTERLEAVED,
                IN_FLOAT32,
            )

    if key_ptr is not None:  # noqa: SIM102
        if program >= QUERY_PROGRAMS:
            of_kv = program - QUERY_PROGRAMS
            heads = of_kv % KV_PROGRAMS * HEADS + tl.arange(0, HEADS).to(tl.int64)[:, None]
            if of_kv < KV_PROGRAMS:
                _move_heads(
                    key_ptr + token * key_token_stride + heads * key_head_stride,
                    key_cache_ptr + heads * HEAD_DIM,
                    heads < NUM_KV_HEADS,
                    slot_ptr + token,
                    NUM_KV_HEADS * HEAD_DIM,
                    None if k_scale_ptr is None else k_scale_ptr + heads,
                    cos,
                    sin,
                    table_pair_stride,
                    HEAD_DIM,
                    PAIRS,
                    INTERLEAVED,
                    IN_FLOAT32,
                )
            else:
                _move_heads(
                    value_ptr + token * value_token_stride + heads * value_head_stride,
                    value_cache_ptr + heads * VALUE_DIM,
                    heads < NUM_KV_HEADS,
                    slot_ptr + token,
                    NUM_KV_HEADS * VALUE_DIM,
                    None if v_scale_ptr is None else v_scale_ptr + heads,
                    None,
                    None,
                    0,
                    VALUE_DIM,
                    0,
                    INTERLEAVED,
                    IN_FLOAT32,
                )


@triton.jit
def _move_heads(
    source,
    target,
    keep,
    slot_ptr,
    slot_stride,
    scales,
    cos_ptr,
    sin_ptr,
    pair_stride,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Copy rows of DIM from `source` to `target`, pointers [heads, 1], and rotate PAIRS pairs.

    If there are slots, `target` points to the first one, and nothing goes to a negative one.
    Nothing that is loaded depends on the slot, which is loaded last, so that no load waits.
    """
    scale = None if scales is None else tl.load(scales, keep, 1.0)
    if 2 * PAIRS < DIM:
        rest = 2 * PAIRS + tl.arange(0, triton.next_power_of_2(DIM - 2 * PAIRS))[None, :]
        in_rest = keep & (rest < DIM)
        unturned = tl.load(source + rest, in_rest, 0.0)
    if PAIRS > 0:
        block: tl.constexpr = triton.next_power_of_2(PAIRS)
        # Each head loads the tables again, from the L1 cache: threads exchange nothing.
        pairs = tl.broadcast_to(tl.arange(0, block)[None, :], (source.shape[0], block))
        in_pairs = keep & (pairs < PAIRS)
        cos = tl.load(cos_ptr + pairs * pair_stride, in_pairs, 0.0).to(tl.float32)
        sin = tl.load(sin_ptr + pairs * pair_stride, in_pairs, 0.0).to(tl.float32)
        both = tl.arange(0, 2 * block)[None, :]
        in_both = keep & (both < 2 * PAIRS)
        if INTERLEAVED:
            x = tl.load(source + both, in_both, 0.0)
            first, second = tl.split(tl.reshape(x, (source.shape[0], block, 2)))
        else:
            first = tl.load(source + pairs, in_pairs, 0.0)
            second = tl.load(source + PAIRS + pairs, in_pairs, 0.0)
    if slot_ptr is not None:
        slot = tl.load(slot_ptr)
        keep &= slot >= 0
        target += slot * slot_stride
    if PAIRS > 0:
        dtype: tl.constexpr = source.dtype.element_ty
        by_type: tl.constexpr = cos_ptr.dtype.element_ty == dtype and not IN_FLOAT32
        rounded: tl.constexpr = dtype if by_type else tl.float32
        first, second = first.to(tl.float32), second.to(tl.float32)
        turned_first = (first * cos).to(rounded).to(tl.float32)
        turned_first -= (second * sin).to(rounded).to(tl.float32)
        turned_second = (second * cos).to(rounded).to(tl.float32)
        turned_second += (first * sin).to(rounded).to(tl.float32)
        if INTERLEAVED:
            turned = tl.join(turned_first, turned_second)
            turned = tl.reshape(turned, (source.shape[0], 2 * block)).to(dtype)
            _store(target + both, turned, in_both & keep, scale)
        else:
            _store(target + pairs, turned_first.to(dtype), in_pairs & keep, scale)
            _store(target + PAIRS + pairs, turned_second.to(dtype), in_pairs & keep, scale)
    if 2 * PAIRS < DIM:
        _store(target + rest, unturned, in_rest & keep, scale)


@triton.jit
def _store(target, x, mask, scale):
    if scale is not None:
        x = _e4m3_bits(tl.div_rn(x.to(tl.float32), scale))
    tl.store(target, x, mask)


@triton.jit
def _e4m3_bits(x):
    """Round float32 to nearest even, saturated, as bits of float8_e4m3fn. NaN stays NaN.

    The arithmetic is integer, so that it works on GPUs without the type, and alike on all.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    bounded = tl.minimum(size, 0x43E00000)  # 448
    # The fraction goes from 23 bits to 3, and the exponent's bias from 127 to 7.
    normal = ((bounded + 0x7FFFF + ((bounded >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6, codes are multiples of 2^-9, to which adding 2^14 rounds a float32.
    tiny = (bounded.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(bounded < 0x3C800000, tiny, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
