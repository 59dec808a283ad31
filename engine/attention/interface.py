"""The attention function that transformers calls, and how a step's metadata reaches it.

transformers lets a model's attention be chosen by name. Ours finds everything it needs
on the module that calls it: a `PagedAttention`, bound at load, with the layer's share of
the KV cache and the `StepContext` that all layers have in common. Nothing travels as a
keyword, since some model families swallow those, and nothing is global.

The name has no mask function registered beside it: transformers then builds no mask.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from engine.fusion.deferred import Rotated
from kernels.ops import Ops
from kernels.paged_attention.mask import MaskSpec

ATTENTION_NAME = "skiff"


@dataclass(slots=True)
class StepContext:
    """The step in progress, and whose kernels run it. One per model; set before each forward.

    `pools` is the whole of the KV cache.
    """

    ops: Ops
    pools: list[Tensor]
    metadata: Any = None


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One attention call's K and V in the cache, and which keys its queries see.

    key    [num_blocks, block_size, num_kv_heads, head_dim]
    value  [num_blocks, block_size, num_kv_heads, value_dim]
    writes is False where the call shares what an earlier layer has stored already.
    k_scale, v_scale  [num_kv_heads] float32, of a cache in fp8; else None
    """

    key: Tensor
    value: Tensor
    mask: MaskSpec
    writes: bool
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class PagedAttention:
    """What one attention module needs; a module may attend several times per forward."""

    def __init__(self, context: StepContext, calls: list[LayerCache]):
        self.context = context
        self._calls = calls
        self._metadata: Any = None
        self._next = 0

    def next_call(self) -> LayerCache:
        """This call's cache. Counting starts anew with each step's metadata, and each forward."""
        metadata = self.context.metadata
        assert metadata is not None, "forward outside of a step"
        if metadata is not self._metadata or self._next == len(self._calls):
            self._metadata, self._next = metadata, 0
        self._next += 1
        return self._calls[self._next - 1]


def attention_forward(
    module: nn.Module,
    query: Tensor | Rotated,
    key: Tensor | Rotated,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: [1, heads, T, dim] in, [1, T, heads, dim] out."""
    paged: PagedAttention = module.paged_attention  # type: ignore[assignment]
    call, ops, metadata = paged.next_call(), paged.context.ops, paged.context.metadata
    output = ops.paged_attention(
        _store(call, ops, metadata.slot_mapping, query, key, value),
        call.key,
        call.value,
        metadata,
        call.mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sinks=s_aux,
        k_scale=call.k_scale,
        v_scale=call.v_scale,
    )
    return output.unsqueeze(0), None


def _store(
    call: LayerCache,
    ops: Ops,
    slot_mapping: Tensor,
    query: Tensor | Rotated,
    key: Tensor | Rotated,
    value: Tensor,
) -> Tensor:
    """Write the step's keys and values; the query, rotated and [T, heads, dim]."""
    caches = call.key, call.value, slot_mapping, call.k_scale, call.v_scale
    if isinstance(query, Rotated) and isinstance(key, Rotated) and call.writes:
        rotary = query.rotation.rotary
        sources = _packed(query.source), _packed(key.source), _packed(value)
        return ops.rotary_store_kv(*sources, rotary, *caches)
    query, key = (x.materialize() if isinstance(x, Rotated) else x for x in (query, key))
    if call.writes:
        ops.store_kv(_packed(key), _packed(value), *caches)
    return _packed(query)


def _packed(x: Tensor) -> Tensor:
    """[1, heads, T, dim] as [T, heads, dim]."""
    return x[0].transpose(0, 1)


AttentionInterface.register(ATTENTION_NAME, attention_forward)
