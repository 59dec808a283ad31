"""A watermark in the choice of tokens (Kirchenbauer et al. 2023, "A Watermark for LLMs").

The previous token seeds a hash that puts a share `gamma` of the vocabulary on a green list;
the scores of green tokens are raised by `delta`. A detector that knows the hash finds more
green tokens in a watermarked text than chance would have put there. The hash is that of
`kernels.sampling`: a green list is a function of the previous token, computed where it is
needed. (Text Generation Inference draws a permutation from the device's generator, so its
lists differ from device to device.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused_sampling import numbers
from kernels.sampling import hash31

_SEED = 15485863
"""A large prime, Text Generation Inference's, by which the previous token is multiplied."""
_BLOCK = 1024


def green_list(previous: Tensor, gamma: float, vocab_size: int) -> Tensor:
    """Return which tokens are green after the `previous` tokens, [rows, vocab_size] bool.

    previous  [rows] int64
    """
    keys = torch.stack([(previous * _SEED).to(torch.int32), torch.zeros_like(previous)], dim=1)
    return hash31(keys.to(torch.int32), vocab_size) < _threshold(gamma)


def _threshold(gamma: float) -> int:
    return min(int(gamma * 2**31), 0x7FFFFFFF)


def watermark_torch(
    logits: Tensor, rows: Tensor, previous: Tensor, gamma: float, delta: float
) -> None:
    """Raise the scores of green tokens by `delta`, in place, for some rows of a batch.

    logits    [batch, vocab_size]
    rows      [watermarked] int64
    previous  [batch] int64: the previous token of every row
    """
    green = green_list(previous[rows], gamma, logits.shape[1])
    x = logits[rows]
    logits[rows] = torch.where(green, (x.float() + delta).to(x.dtype), x)


def watermark_triton(
    logits: Tensor, rows: Tensor, previous: Tensor, gamma: float, delta: float
) -> None:
    """Do what `watermark_torch` does. Reads and writes V scores per row."""
    vocab_size = logits.shape[1]
    assert logits.stride(1) == 1
    _watermark_kernel[(triton.cdiv(vocab_size, _BLOCK), len(rows))](
        logits,
        logits.stride(0),
        rows,
        previous,
        _threshold(gamma),
        delta,
        vocab_size,
        SEED=_SEED,
        BLOCK=_BLOCK,
    )


@triton.jit
def _watermark_kernel(
    logits_ptr,
    row_stride,
    rows_ptr,
    previous_ptr,
    threshold,
    delta,
    vocab_size,
    SEED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.load(rows_ptr + tl.program_id(1))
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = ids < vocab_size
    key = (tl.load(previous_ptr + row) * SEED).to(tl.int32)
    is_green = numbers.hash31(ids, key, tl.zeros_like(key)) < threshold
    scores = logits_ptr + row * row_stride + ids
    x = tl.load(scores, mask=mask, other=0.0)
    raised = (x.to(tl.float32) + delta).to(x.dtype)
    tl.store(scores, raised, mask=mask & is_green)
