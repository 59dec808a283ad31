"""Masking tokens that a grammar forbids: their scores become -inf."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def mask_tokens_torch(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Mask the forbidden tokens of some rows of a batch, in place.

    logits  [batch, vocab_size]
    rows    [masked] int64
    masks   [masked, ceil(vocab_size / 32)] int32: bit i % 32 of word i // 32 allows token i
    """
    bits = torch.arange(32, dtype=torch.int32, device=masks.device)
    forbidden = (masks[:, :, None] >> bits) & 1 == 0
    forbidden = forbidden.flatten(1)[:, : logits.shape[1]]
    logits[rows] = logits[rows].masked_fill(forbidden, -torch.inf)


def mask_tokens_triton(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Do what `mask_tokens_torch` does.

    Reads V / 8 bytes of mask per row, and writes the scores of forbidden tokens.
    """
    vocab_size = logits.shape[1]
    assert logits.stride(1) == masks.stride(1) == 1
    _mask_tokens_kernel[(triton.cdiv(vocab_size, _BLOCK), len(rows))](
        logits, logits.stride(0), rows, masks, masks.stride(0), vocab_size, BLOCK=_BLOCK
    )


@triton.jit
def _mask_tokens_kernel(
    logits_ptr, row_stride, rows_ptr, masks_ptr, mask_stride, vocab_size, BLOCK: tl.constexpr
):
    index = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + index)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_vocab = ids < vocab_size
    words = tl.load(masks_ptr + index * mask_stride + ids // 32, mask=in_vocab, other=-1)
    is_forbidden = ((words >> (ids % 32)) & 1) == 0
    minus_infinity = tl.full([BLOCK], float("-inf"), logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + row * row_stride + ids, minus_infinity, mask=in_vocab & is_forbidden)
