"""Which implementation of each op a device runs: chosen once, when a model is loaded."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import activation, norm, store_kv, token_mask, watermark
from kernels.paged_attention.kernel import paged_attention_triton
from kernels.paged_attention.reference import paged_attention_torch


@dataclass(frozen=True, slots=True)
class Ops:
    """Each op's docstring is where it is defined.

    is_triton  which metadata they take: a list of work in device memory, or the host's numbers
    fuses      one op is worth more than its parts: where each is a launch, as on a GPU
    """

    is_triton: bool
    fuses: bool
    paged_attention: Callable[..., Tensor]
    store_kv: Callable[..., None]
    rotary_store_kv: Callable[..., Tensor]
    norm: Callable[..., Tensor]
    add_norm: Callable[..., tuple[Tensor, Tensor]]
    act_mul: Callable[..., Tensor]
    mask_tokens: Callable[..., None]
    watermark: Callable[..., None]


TORCH = Ops(
    is_triton=False,
    fuses=False,
    paged_attention=paged_attention_torch,
    store_kv=store_kv.store_kv_torch,
    rotary_store_kv=store_kv.rotary_store_kv_torch,
    norm=norm.norm_torch,
    add_norm=norm.add_norm_torch,
    act_mul=activation.act_mul_torch,
    mask_tokens=token_mask.mask_tokens_torch,
    watermark=watermark.watermark_torch,
)
TRITON = Ops(
    is_triton=True,
    fuses=True,
    paged_attention=paged_attention_triton,
    store_kv=store_kv.store_kv_triton,
    rotary_store_kv=store_kv.rotary_store_kv_triton,
    norm=norm.norm_triton,
    add_norm=norm.add_norm_triton,
    act_mul=activation.act_mul_triton,
    mask_tokens=token_mask.mask_tokens_triton,
    watermark=watermark.watermark_triton,
)


def ops_for(device: torch.device) -> Ops:
    return TRITON if device.type == "cuda" else TORCH
