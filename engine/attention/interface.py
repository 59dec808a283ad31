"""The attention function that transformers calls, and how a step's metadata reaches it.

transformers lets a model's attention function be chosen by name. This one finds everything
it needs on the module that calls it: a `PagedAttention`, bound at load, with the layer's share
of the KV cache and the `StepContext` that all layers have in common. Nothing is passed as a
keyword, since some model families swallow those, and nothing is global.

No mask function is registered under the same name: transformers then builds no mask.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import AttentionInterface

from engine.fusion.deferred import Rotated
from kernels.ops import Ops
from kernels.paged_attention.mask import MaskSpec
from kernels.paged_attention.plan import PagedBatch
from kernels.paged_attention.reference import AttentionMetadata

ATTENTION_NAME = "skiff"


StepMetadata = AttentionMetadata | PagedBatch
"""What every attention layer of one step needs to know, for the torch or the Triton kernels."""


@dataclass(slots=True)
class StepContext:
    """The step in progress, and the kernels that run it. One per model.

    pools         the K and V tensors of the whole KV cache
    metadata      of the step in progress
    num_forwards  that were begun, the one in progress included
    """

    ops: Ops
    pools: list[Tensor]
    metadata: StepMetadata | None = None
    num_forwards: int = 0

    def begin(self, metadata: StepMetadata) -> None:
        """Begin a forward of the model for a step with this metadata."""
        self.metadata = metadata
        self.num_forwards += 1


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One attention call's K and V in the cache, and which keys its queries see.

    key               [num_blocks, block_size, num_kv_heads, head_dim]
    value             [num_blocks, block_size, num_kv_heads, value_dim]
    writes            False if an earlier layer has already stored the K and V of this call
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
        self._forward = 0
        self._next = 0

    def next_call(self) -> tuple[LayerCache, StepMetadata]:
        """Return the cache of the call in progress, and the step's metadata.

        Calls are counted from 0 again with each forward, also after one that broke off.
        """
        metadata = self.context.metadata
        assert metadata is not None, "forward outside of a step"
        if self._forward != self.context.num_forwards:
            self._forward, self._next = self.context.num_forwards, 0
        self._next += 1
        return self._calls[self._next - 1], metadata


_HEEDED_KEYWORDS = ("scaling", "softcap", "s_aux")
"""Keywords that `attention_forward` takes as parameters."""
_IGNORED_KEYWORDS = {
    "position_ids": "positions are already in the rotated queries and keys",
    "cache_position": "positions are already in the rotated queries and keys",
    "position_embeddings": "the module has already rotated its queries and keys",
    "input_ids": "the module has already computed its queries, keys and values",
    "sliding_window": "read at load, where it is part of the layer's mask",
    "past_key_values": "K and V are kept in the paged cache",
    "cache_params": "state outside of attention: the check at load refuses models that need it",
    "use_cache": "K and V are kept in the paged cache",
    "output_attentions": "asks for weights, which no caller of the model reads",
    "output_hidden_states": "asks for an output that no caller of the model reads",
    "output_router_logits": "asks for an output that no caller of the model reads",
    "return_dict": "says how the model returns its outputs",
    "logits_to_keep": "says which logits the model returns",
}
"""Keywords that may have any value, each with the reason why attention need not heed it."""
_NEUTRAL_VALUES = {"dropout": 0, "is_causal": True}
"""Keywords that may have this value: it asks for what is computed anyway."""


def unsupported_keywords(keywords: Mapping[str, object]) -> list[str]:
    """Return the names of the keywords that ask attention for something it does not do.

    A keyword that is None asks for nothing.
    """
    return [
        name
        for name, value in keywords.items()
        if not (
            value is None
            or name in _HEEDED_KEYWORDS
            or name in _IGNORED_KEYWORDS
            or (name in _NEUTRAL_VALUES and value == _NEUTRAL_VALUES[name])
        )
    ]


def attention_forward(
    module: nn.Module,
    query: Tensor | Rotated,
    key: Tensor | Rotated,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **keywords: object,
) -> tuple[Tensor, None]:
    """Attend over the paged cache, with transformers' attention signature.

    Takes [1, heads, T, dim] and returns [1, T, heads, dim]. Raises TypeError for a keyword that
    asks for anything else.
    """
    if unsupported := unsupported_keywords(keywords):
        raise TypeError(f"attention does not support {', '.join(unsupported)}")
    paged: PagedAttention = module.paged_attention  # type: ignore[assignment]
    call, metadata = paged.next_call()
    ops = paged.context.ops
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
    """Write the step's keys and values to the cache; return the rotated query, [T, heads, dim]."""
    caches = call.key, call.value, slot_mapping, call.k_scale, call.v_scale
    if isinstance(query, Rotated) and isinstance(key, Rotated) and call.writes:
        rotary = query.rotation.rotary
        rows = _packed(query.source)
        return ops.rotary_store_kv(rows, _packed(key.source), _packed(value), rotary, *caches)
    query, key = (x.materialize() if isinstance(x, Rotated) else x for x in (query, key))
    if call.writes:
        ops.store_kv(_packed(key), _packed(value), *caches)
    return _packed(query)


def _packed(x: Tensor) -> Tensor:
    """View [1, heads, T, dim] as [T, heads, dim]."""
    return x[0].transpose(0, 1)


AttentionInterface.register(ATTENTION_NAME, attention_forward)
