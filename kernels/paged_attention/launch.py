"""Launches the attention kernel for a step: once for its decodes, once for its prompts."""

import torch
from torch import Tensor

from kernels.dependent_launch import dependent_launch
from kernels.paged_attention.kernel import attend_kernel
from kernels.paged_attention.mask import MaskSpec
from kernels.paged_attention.plan import STEP_QUERIES, PagedBatch, Work, block_q_for
from kernels.paged_attention.tuning import KernelSpec, variant_for
from kernels.target import target_of


def paged_attention_triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: PagedBatch,
    spec: MaskSpec,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Return the causal attention, [num_tokens, num_heads, value_dim] in `query`'s dtype.

    The last dimension of the query and the caches must be contiguous; other strides are free.

    query         [num_tokens, num_heads, head_dim]
    key_cache     [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache   [num_blocks, block_size, num_kv_heads, value_dim]
    scale         positive
    softcap       scores become softcap * tanh(scores / softcap)
    sinks         [num_heads]: one more logit for each head in the softmax, without a value
    k_scale, v_scale  [num_kv_heads] float32: factors of the values in float8_e4m3fn caches

    Rows that no work item covers are not written.

    The kernel reads the queries once. It reads the keys and values that a decode sees once, and
    those that a prefill chunk sees once for each tile of about 128 rows, mostly from the L2
    cache. It writes the output once. Partials of tiles that several programs share are written
    and read: beside what decodes read, these are 4 * (value_dim + 2) / (keys in a split * bytes
    of a key and its value), times the query heads of a key/value head.
    """
    output = query.new_empty(*query.shape[:2], value_cache.shape[-1])
    target = target_of(query.device)
    value_dim = value_cache.shape[-1]
    if value_cache.dtype == torch.float8_e4m3fn:
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.int16)
    works = [] if metadata.decode is None else [metadata.decode]
    if metadata.prefill:
        works.append(metadata.prefill[block_q_for(query.shape[1] // key_cache.shape[2])])
    for work in works:
        variant = variant_for(
            target,
            work is metadata.decode,
            work.block_q,
            query.dtype,
            query.shape[1:],
            key_cache.dtype,
            key_cache.shape[1:],
            key_cache.stride(),
            value_dim,
            value_cache.stride(),
            metadata.block_tables.stride(0),
            spec,
            scale,
            softcap,
        )
        num_units = len(work.items) * key_cache.shape[2]
        acc, stats = _scratch(work, num_units, variant.spec, metadata.counters)
        attend_kernel[(min(num_units, variant.max_programs),)](
            output,
            query,
            key_cache,
            value_cache,
            metadata.block_tables,
            work.items,
            work.num_items,
            metadata.counters,
            acc,
            stats,
            sinks,
            k_scale,
            v_scale,
            query.stride(0),
            query.stride(1),
            variant.spec,
            num_warps=variant.num_warps,
            num_stages=variant.num_stages,
            **dependent_launch(query.device),
        )
        del acc, stats  # free them before the next: a captured step keeps its peak of memory
    return output


def _scratch(
    work: Work, num_units: int, spec: KernelSpec, counters: Tensor
) -> tuple[Tensor, Tensor]:
    """Allocate memory for the partials of all units that may be one of several splits."""
    if not spec.runs:
        num_units = min(num_units, STEP_QUERIES // work.block_q * spec.num_kv_heads)
    assert len(counters) >= num_units, f"{len(counters)} counters for {num_units} units"
    rows = num_units * work.block_q * spec.group
    scratch = torch.empty(rows * (spec.block_v + 2), dtype=torch.float32, device=counters.device)
    return scratch, scratch[rows * spec.block_v :]
