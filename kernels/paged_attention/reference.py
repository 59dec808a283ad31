"""Attention of packed queries over the paged KV cache.

One call serves a whole step: sequences with one query (decodes) and sequences with many
(prefill chunks), each over its own context, found through its block table.

The torch implementation groups sequences of equal query length and similar context,
gathers each group's blocks and runs one `scaled_dot_product_attention` per group. Per
layer it reads and writes every gathered K and V once more than the arithmetic needs.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.paged_attention.mask import MaskSpec


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """What every attention layer of one step needs to know.

    The sequences' queries lie one after the other in the packed row, and are the last
    `query_lens` positions of their `seq_lens`. Keys and values of all `seq_lens`
    positions are in the cache once this step's are stored.

    query_lens    [num_sequences] int64, on the host
    seq_lens      [num_sequences] int64, on the host
    block_tables  [num_sequences, max_blocks] int64, on the host, padded with anything
    slot_mapping  [num_tokens] int64, on the device
    """

    query_lens: np.ndarray
    seq_lens: np.ndarray
    block_tables: np.ndarray
    slot_mapping: Tensor
    block_size: int
    _groups: dict[tuple[MaskSpec, torch.dtype], list["_Group"]] = field(default_factory=dict)

    def groups(self, spec: MaskSpec, dtype: torch.dtype) -> list["_Group"]:
        """The step's sequences by shape, prepared once for all layers with this mask."""
        if (spec, dtype) not in self._groups:
            self._groups[spec, dtype] = _build_groups(self, spec, dtype)
        return self._groups[spec, dtype]


def paged_attention_torch(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    spec: MaskSpec,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention; returns [num_tokens, num_heads, value_dim] in `query`'s dtype.

    query         [num_tokens, num_heads, head_dim], any strides
    key_cache     [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache   [num_blocks, block_size, num_kv_heads, value_dim]
    softcap       scores become softcap * tanh(scores / softcap)
    sinks         [num_heads]: one more logit per head in the softmax, with no value
    k_scale, v_scale  [num_kv_heads] float32: what float8_e4m3fn caches are to be times
    """
    output = query.new_empty(*query.shape[:2], value_cache.shape[-1])
    for group in metadata.groups(spec, query.dtype):
        keys = _decoded(group.gather(key_cache), k_scale, query.dtype)
        values = _decoded(group.gather(value_cache), v_scale, query.dtype)
        queries = query[group.rows].unflatten(0, group.shape).transpose(1, 2)
        if softcap is None and sinks is None:
            attended = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=group.mask, scale=scale, enable_gqa=True
            )
        else:
            mask = group.mask
            attended = _explicit_attention(queries, keys, values, mask, scale, softcap, sinks)
        output[group.rows] = attended.transpose(1, 2).flatten(0, 1)
    return output


def _decoded(context: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, num_kv_heads, L, dim] times what each head's values are in units of."""
    if scale is None:
        return context.to(dtype)
    return (context.float() * scale.view(-1, 1, 1)).to(dtype)


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What `scaled_dot_product_attention` has no words for; float32 softmax.

    query       [B, num_heads, n, head_dim]
    key, value  [B, num_kv_heads, L, head_dim or value_dim]
    mask        [B, 1, n, L], added to the scores
    """
    num_kv_heads = key.shape[1]
    grouped = query.unflatten(1, (num_kv_heads, -1))  # [B, num_kv_heads, group, n, head_dim]
    scores = grouped @ key.unsqueeze(2).transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.flatten(1, 2).float() + mask  # [B, num_heads, n, L]
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    probs = scores.softmax(dim=-1)[..., : key.shape[2]].to(value.dtype)
    return (probs.unflatten(1, (num_kv_heads, -1)) @ value.unsqueeze(2)).flatten(1, 2)


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences with the same number of queries, gathered into one dense batch.

    rows    [B * n] int64: their queries in the packed row (a slice where contiguous)
    blocks  [B * max_blocks] int64: their context, padded with the group's first block
    pad     [num_pad] int64: gathered positions past the end of their sequence
    mask    [B, 1, n, L] additive
    """

    rows: Tensor | slice
    shape: tuple[int, int]
    blocks: Tensor
    pad: Tensor
    mask: Tensor

    def gather(self, cache: Tensor) -> Tensor:
        """The group's context, [B, num_kv_heads, L, dim].

        Positions past a sequence's end hold what an earlier owner left there. Masking
        their scores is not enough, 0 * NaN being NaN: they are zeroed, so that no
        sequence can ever harm another.
        """
        dtype = cache.dtype
        if dtype.itemsize == 1:  # float8 has no indexing on the CPU
            cache = cache.view(torch.uint8)
        context = cache.flatten(1).index_select(0, self.blocks)
        context = context.view(-1, *cache.shape[2:]).index_fill_(0, self.pad, 0)
        return context.view(dtype).unflatten(0, (self.shape[0], -1)).transpose(1, 2)


def _build_groups(metadata: AttentionMetadata, spec: MaskSpec, dtype: torch.dtype) -> list[_Group]:
    query_lens, seq_lens = metadata.query_lens, metadata.seq_lens
    first_query = seq_lens - query_lens
    first_key = np.maximum(first_query - spec.window + 1, first_query // spec.chunk * spec.chunk)
    first_block = np.maximum(first_key, 0) // metadata.block_size
    num_blocks = -(-seq_lens // metadata.block_size) - first_block
    # Padding within a group stays below a factor of two, save for short contexts, where
    # one larger group beats several small ones.
    size_class = np.ceil(np.log2(np.maximum(num_blocks, 8))).astype(np.int64)
    keys = query_lens * 64 + size_class
    return [
        _build_group(metadata, spec, dtype, np.flatnonzero(keys == key), first_block, num_blocks)
        for key in np.unique(keys)
    ]


def _build_group(
    metadata: AttentionMetadata,
    spec: MaskSpec,
    dtype: torch.dtype,
    members: np.ndarray,
    first_block: np.ndarray,
    num_blocks: np.ndarray,
) -> _Group:
    device = metadata.slot_mapping.device
    block_size = metadata.block_size
    num_queries = int(metadata.query_lens[members[0]])
    seq_lens = metadata.seq_lens[members, None]
    width = int(num_blocks[members].max())

    columns = first_block[members, None] + np.arange(width)
    valid = columns < -(-seq_lens // block_size)
    tables = metadata.block_tables[members]
    blocks = np.where(
        valid,
        np.take_along_axis(tables, np.minimum(columns, tables.shape[1] - 1), axis=1),
        tables[0, 0],
    )
    key_pos = (columns[:, :, None] * block_size + np.arange(block_size)).reshape(len(members), -1)
    query_pos = seq_lens - num_queries + np.arange(num_queries)
    k, q = key_pos[:, None, :], query_pos[:, :, None]
    visible = (k <= q) & (k > q - spec.window) & (k >= q // spec.chunk * spec.chunk)
    mask = np.where(visible, np.float32(0), np.float32(-np.inf))[:, None]
    return _Group(
        rows=_packed_rows(metadata.query_lens, members, device),
        shape=(len(members), num_queries),
        blocks=torch.from_numpy(blocks.reshape(-1)).to(device),
        pad=torch.from_numpy(np.flatnonzero(key_pos >= seq_lens)).to(device),
        mask=torch.from_numpy(mask).to(device=device, dtype=dtype),
    )


def _packed_rows(
    query_lens: np.ndarray, members: np.ndarray, device: torch.device
) -> Tensor | slice:
    starts = np.cumsum(query_lens) - query_lens
    num_queries = int(query_lens[members[0]])
    if members[-1] - members[0] + 1 == len(members):
        return slice(int(starts[members[0]]), int(starts[members[-1]]) + num_queries)
    rows = (starts[members, None] + np.arange(num_queries)).reshape(-1)
    return torch.from_numpy(rows).to(device)
