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

from kernels.paged_attention import AttentionMetadata, MaskSpec, paged_attention
from kernels.store_kv import store_kv

ATTENTION_NAME = "skiff"


class StepContext:
    """The step in progress. One per model; set before each forward."""

    metadata: AttentionMetadata | None = None


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One attention call's K and V in the cache, and which keys its queries see.

    key    [num_blocks, block_size, num_kv_heads, head_dim]
    value  [num_blocks, block_size, num_kv_heads, value_dim]
    writes is False where the call shares what an earlier layer has stored already.
    """

    key: Tensor
    value: Tensor
    mask: MaskSpec
    writes: bool


class PagedAttention:
    """What one attention module needs; a module may attend several times per forward."""

    def __init__(self, context: StepContext, calls: list[LayerCache]):
        self._context = context
        self._calls = calls
        self._metadata: AttentionMetadata | None = None
        self._next = 0

    def next_call(self) -> tuple[LayerCache, AttentionMetadata]:
        """This call's cache. Counting starts anew with each step's metadata."""
        metadata = self._context.metadata
        assert metadata is not None, "forward outside of a step"
        if metadata is not self._metadata:
            self._metadata, self._next = metadata, 0
        call = self._calls[self._next]
        self._next += 1
        return call, metadata


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: [1, heads, T, dim] in, [1, T, heads, dim] out."""
    paged: PagedAttention = module.paged_attention  # type: ignore[assignment]
    call, metadata = paged.next_call()
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if call.writes:
        store_kv(key, value, call.key, call.value, metadata.slot_mapping)
    output = paged_attention(
        query,
        call.key,
        call.value,
        metadata,
        call.mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sinks=s_aux,
    )
    return output.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, attention_forward)
