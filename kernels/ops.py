"""The implementations of each op, of which a model takes one set when it is loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kernels.activation import act_mul_torch, act_mul_triton
from kernels.gemv import gemv_torch, gemv_triton
from kernels.grouped_gemm import (
    GateForm,
    Routing,
    combine_torch,
    combine_triton,
    grouped_linear_torch,
    grouped_linear_triton,
    route_torch,
    route_triton,
    sample_routings_torch,
    sample_routings_triton,
)
from kernels.invariant_linear import invariant_linear_torch, invariant_linear_triton
from kernels.norm import NormForm, add_norm_torch, add_norm_triton, norm_torch, norm_triton
from kernels.paged_attention.launch import paged_attention_triton
from kernels.paged_attention.mask import MaskSpec
from kernels.paged_attention.plan import PagedBatch
from kernels.paged_attention.reference import AttentionMetadata, paged_attention_torch
from kernels.store_kv import (
    Rotary,
    rotary_store_kv_torch,
    rotary_store_kv_triton,
    store_kv_torch,
    store_kv_triton,
)
from kernels.token_mask import mask_tokens_torch, mask_tokens_triton
from kernels.watermark import watermark_torch, watermark_triton

Metadata = TypeVar("Metadata")
"""What attention has to know of a step: `AttentionMetadata` or `PagedBatch`."""
_Metadata = TypeVar("_Metadata", contravariant=True)


class PagedAttention(Protocol[_Metadata]):
    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: _Metadata,
        spec: MaskSpec,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor: ...


class StoreKv(Protocol):
    def __call__(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None: ...


class RotaryStoreKv(Protocol):
    def __call__(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        rotary: Rotary,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor: ...


class Gemv(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, prefetches: bool = False
    ) -> Tensor: ...


class GroupedLinear(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        routing: Routing,
        transposed: bool = False,
        form: GateForm | None = None,
    ) -> Tensor: ...


class InvariantLinear(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...


Norm = Callable[[Tensor, Tensor | None, Tensor | None, NormForm], Tensor]
AddNorm = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, NormForm], tuple[Tensor, Tensor]]
ActMul = Callable[[Tensor, Tensor, str], Tensor]
Route = Callable[[Tensor, int], Routing]
Combine = Callable[[Tensor, Tensor, Routing, int], Tensor]
MaskTokens = Callable[[Tensor, Tensor, Tensor], None]
Watermark = Callable[[Tensor, Tensor, Tensor, float, float], None]


@dataclass(frozen=True, slots=True)
class Ops(Generic[Metadata]):
    """One implementation of every op. The docstring of an op is that of its torch function.

    is_triton  the ops read their metadata from device memory, not from the host
    fuses      one fused op costs less than its parts, as on a GPU, where each part is a launch
    """

    is_triton: bool
    fuses: bool
    paged_attention: PagedAttention[Metadata]
    store_kv: StoreKv
    rotary_store_kv: RotaryStoreKv
    norm: Norm
    add_norm: AddNorm
    act_mul: ActMul
    route: Route
    sample_routings: Callable[[int, torch.device], list[Routing]]
    grouped_linear: GroupedLinear
    combine: Combine
    invariant_linear: InvariantLinear
    gemv: Gemv
    mask_tokens: MaskTokens
    watermark: Watermark


TORCH: Ops[AttentionMetadata] = Ops(
    is_triton=False,
    fuses=False,
    paged_attention=paged_attention_torch,
    store_kv=store_kv_torch,
    rotary_store_kv=rotary_store_kv_torch,
    norm=norm_torch,
    add_norm=add_norm_torch,
    act_mul=act_mul_torch,
    route=route_torch,
    sample_routings=sample_routings_torch,
    grouped_linear=grouped_linear_torch,
    combine=combine_torch,
    invariant_linear=invariant_linear_torch,
    gemv=gemv_torch,
    mask_tokens=mask_tokens_torch,
    watermark=watermark_torch,
)
TRITON: Ops[PagedBatch] = Ops(
    is_triton=True,
    fuses=True,
    paged_attention=paged_attention_triton,
    store_kv=store_kv_triton,
    rotary_store_kv=rotary_store_kv_triton,
    norm=norm_triton,
    add_norm=add_norm_triton,
    act_mul=act_mul_triton,
    route=route_triton,
    sample_routings=sample_routings_triton,
    grouped_linear=grouped_linear_triton,
    combine=combine_triton,
    invariant_linear=invariant_linear_triton,
    gemv=gemv_triton,
    mask_tokens=mask_tokens_triton,
    watermark=watermark_triton,
)


def ops_for(device: torch.device) -> Ops[Any]:
    """Return the Triton ops for a GPU, the torch ops for any other device."""
    return TRITON if device.type == "cuda" else TORCH
