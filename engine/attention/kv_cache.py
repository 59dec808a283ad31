"""The K and V tensors of every attention call, and how many bytes a block costs."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from engine.attention.interface import LayerCache, PagedAttention, StepContext
from engine.core.config import BLOCK_SIZE, EngineConfig
from kernels.ops import Ops
from kernels.paged_attention.mask import MaskSpec


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of the attention function in a forward, as discovered at load.

    `shared_with` is the index of the earlier call whose K and V this one reuses. `k_scale` and
    `v_scale`, [num_kv_heads] float32, are what a cache in fp8 divides the keys and values by; None
    if the checkpoint does not say.
    """

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    mask: MaskSpec
    shared_with: int | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @property
    def geometry(self) -> tuple[int, int, int]:
        return self.num_kv_heads, self.head_dim, self.value_dim


def cache_dtype(config: EngineConfig, model_dtype: torch.dtype) -> torch.dtype:
    return torch.float8_e4m3fn if config.kv_cache_dtype == "fp8_e4m3fn" else model_dtype


def bytes_per_block(calls: list[AttentionCall], dtype: torch.dtype) -> int:
    """Return the device memory of one block, over all layers."""
    values = sum(
        call.num_kv_heads * (call.head_dim + call.value_dim)
        for call in calls
        if call.shared_with is None
    )
    return BLOCK_SIZE * values * dtype.itemsize


def bind_kv_cache(
    calls: list[AttentionCall],
    num_blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
) -> StepContext:
    """Allocate the cache, uninitialised, and give every attention module its share of it.

    Calls of equal geometry share one K and one V tensor of
    [calls, num_blocks, block_size, num_kv_heads, dim]. Each step's metadata reaches the modules
    through the returned context. A cache that was bound before is dropped first. The scales of
    an 8-bit cache are the checkpoint's, or else 1: it then stores the values themselves.
    """
    unbind_kv_cache(calls)
    caches, pools = _allocate(calls, num_blocks, dtype, device)
    context = StepContext(ops, pools)
    per_module: dict[nn.Module, list[LayerCache]] = defaultdict(list)
    for call, cache in zip(calls, caches, strict=True):
        per_module[call.module].append(cache)
    for module, layer_caches in per_module.items():
        module.paged_attention = PagedAttention(context, layer_caches)  # type: ignore[assignment]
    return context


def unbind_kv_cache(calls: list[AttentionCall]) -> None:
    """Take the cache away from the attention modules that it was given to."""
    for call in calls:
        call.module.paged_attention = None  # type: ignore[assignment]


def copy_blocks(pools: list[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy the contents of the source blocks to the target blocks, in all layers.

    sources, targets  [copies] int64
    """
    for pool in pools:
        pool[:, targets] = pool[:, sources]


def _allocate(
    calls: list[AttentionCall], num_blocks: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[LayerCache], list[torch.Tensor]]:
    """Return the layers' caches, and the tensors they are parts of, [calls, num_blocks, ...]."""
    by_geometry: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for index, call in enumerate(calls):
        if call.shared_with is None:
            by_geometry[call.geometry].append(index)
    stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    pools: list[torch.Tensor] = []
    for (num_heads, head_dim, value_dim), indices in by_geometry.items():
        shape = (len(indices), num_blocks, BLOCK_SIZE, num_heads)
        keys = torch.empty(*shape, head_dim, dtype=dtype, device=device)
        values = torch.empty(*shape, value_dim, dtype=dtype, device=device)
        stored |= {index: (keys[i], values[i]) for i, index in enumerate(indices)}
        pools += [keys, values]
    is_scaled = dtype.itemsize == 1
    caches = []
    for index, call in enumerate(calls):
        owner = index if call.shared_with is None else call.shared_with
        scales = _scales(calls[owner], device) if is_scaled else (None, None)
        writes = call.shared_with is None
        caches.append(LayerCache(*stored[owner], call.mask, writes, *scales))
    # 8-bit floats cannot be indexed, but their bytes can.
    return caches, [pool.view(torch.uint8) if is_scaled else pool for pool in pools]


def _scales(call: AttentionCall, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    ones = torch.ones(call.num_kv_heads, device=device)
    key = ones if call.k_scale is None else call.k_scale.to(device)
    return key, ones if call.v_scale is None else call.v_scale.to(device)
