"""RMSNorm and LayerNorm as the model families of transformers write them, with their rounding.

The models agree on the formula and differ in where they round, which decides the last bit of
every activation. The arithmetic is float32 throughout. With w the weight plus `offset`:

    rounds_first    (w * x_hat.to(dtype)).to(dtype)     llama, qwen, mistral, phi3, t5
    else            (w * x_hat).to(dtype)               gemma, olmo2, gpt_oss, helium, LayerNorm

Without a weight the two are the same. Only the order in which a mean is summed differs from
transformers'.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import dependent_launch, wait_for_kernel_ahead


@dataclass(frozen=True, slots=True)
class NormForm:
    """How a model family computes its norm.

    centred       subtract the mean, as LayerNorm does
    offset        added to the weight in float32, as gemma adds 1
    rounds_first  round to the activations' type before multiplying by the weight
    """

    eps: float
    centred: bool = False
    offset: float = 0.0
    rounds_first: bool = True


def norm_torch(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm) -> Tensor:
    """Normalise the last dimension. The result is contiguous and has the type of `x`.

    x             [..., hidden], any strides
    weight, bias  [hidden], or None

    Makes some ten passes over memory, one for each operation. Float32 has nothing to round on
    the way and uses torch's own norms.
    """
    if x.dtype is torch.float32:
        return _norm_float32(x, weight, bias, form)
    x_hat = x.float()
    if form.centred:
        x_hat = x_hat - x_hat.mean(-1, keepdim=True)
    x_hat = x_hat * torch.rsqrt(x_hat.pow(2).mean(-1, keepdim=True) + form.eps)
    if form.rounds_first:
        x_hat = x_hat.to(x.dtype).float()
    if weight is not None:
        x_hat = x_hat * (weight.float() + form.offset)
    if bias is not None:
        x_hat = x_hat + bias.float()
    return x_hat.to(x.dtype, memory_format=torch.contiguous_format)


def _norm_float32(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm) -> Tensor:
    if weight is not None and form.offset:
        weight = weight + form.offset
    if form.centred:
        return F.layer_norm(x, x.shape[-1:], weight, bias, form.eps)
    normed = F.rms_norm(x, x.shape[-1:], weight, form.eps)
    return (normed if bias is None else normed + bias).contiguous()


def add_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm
) -> tuple[Tensor, Tensor]:
    """Return the norm of `x + residual`, and that sum, which is rounded before the norm."""
    total = x + residual
    return norm_torch(total, weight, bias, form), total


def norm_triton(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm) -> Tensor:
    """Do what `norm_torch` does, for an `x` whose last dimension is contiguous.

    Dimensions before the last two must merge into one, as those of [1, T, heads, dim] do; other
    strides are free. Reads `x` once and writes as much. A GPU may read the weight before
    the kernel ahead has ended, which must not write it.
    """
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, None, normed, weight, bias, form)
    return normed


def add_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm
) -> tuple[Tensor, Tensor]:
    """Do what `add_norm_torch` does, for strides as in `norm_triton`.

    Reads `x` and `residual` once and writes both results: 4 * rows * hidden elements, where an
    addition and a separate norm would move 5.
    """
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(normed)
    _launch(x, residual, total, normed, weight, bias, form)
    return normed, total


def _launch(
    x: Tensor,
    residual: Tensor | None,
    total: Tensor | None,
    normed: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    form: NormForm,
) -> None:
    hidden = x.shape[-1]
    block = triton.next_power_of_2(hidden)
    # Eight elements (16 bytes) for each thread with short rows, several of which form a tile;
    # sixteen with long rows, until a block has no more threads.
    rows_per_program = max(1, 1024 // block)
    num_warps = min(32, max(4, block // 512))
    heads, *x_strides = _two_levels(x)
    _, *residual_strides = _two_levels(x if residual is None else residual)
    num_rows = x.numel() // hidden
    _norm_kernel[(triton.cdiv(num_rows, rows_per_program),)](
        x,
        *x_strides,
        residual,
        *residual_strides,
        total,
        normed,
        weight,
        bias,
        num_rows,
        heads,
        HIDDEN=hidden,
        BLOCK=block,
        ROWS=rows_per_program,
        EPS=form.eps,
        CENTRED=form.centred,
        OFFSET=form.offset,
        ROUNDS_FIRST=form.rounds_first,
        num_warps=num_warps,
        **dependent_launch(x.device),
    )


def _two_levels(x: Tensor) -> tuple[int, int, int]:
    """Return the number of heads, and the strides between tokens and between heads."""
    assert x.stride(-1) == 1
    if x.dim() == 2:
        return 1, x.stride(0), 0
    if x.dim() > 3:
        x = x.view(x.shape[:-2].numel(), *x.shape[-2:])
    return x.shape[1], x.stride(0), x.stride(1)


# The number of tokens of a step takes any value, and must not cause a new compilation.
@triton.jit(do_not_specialize=["num_rows", "heads"])
def _norm_kernel(
    x_ptr,
    x_token_stride,
    x_head_stride,
    residual_ptr,
    residual_token_stride,
    residual_head_stride,
    total_ptr,
    normed_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    heads,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    # Broadcast, so that each row loads the weight where it needs it, out of the L1 cache.
    cols = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (ROWS, BLOCK))
    in_row = cols < HIDDEN
    mask = (rows < num_rows) & in_row
    token, head = (rows // heads).to(tl.int64), (rows % heads).to(tl.int64)
    written = rows.to(tl.int64) * HIDDEN + cols
    dtype: tl.constexpr = normed_ptr.dtype.element_ty

    # First of all: in a step it comes from the device's memory, as other layers' weights have
    # passed through the L2 cache since the step before.
    weight = None if weight_ptr is None else tl.load(weight_ptr + cols, in_row, 0.0)
    wait_for_kernel_ahead(DEPENDENT)
    x = tl.load(x_ptr + token * x_token_stride + head * x_head_stride + cols, mask, 0.0)
    x = x.to(tl.float32)
    if residual_ptr is not None:
        added = residual_ptr + token * residual_token_stride + head * residual_head_stride
        x += tl.load(added + cols, mask, 0.0).to(tl.float32)
        total = x.to(dtype)
        tl.store(total_ptr + written, total, mask)
        x = total.to(tl.float32)
    # Now, while the sums are made: before, there are no registers for it in long rows.
    bias = None if bias_ptr is None else tl.load(bias_ptr + cols, in_row, 0.0)

    if CENTRED:
        x = tl.where(in_row, x - tl.sum(x, 1, keep_dims=True) * (1.0 / HIDDEN), 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) * (1.0 / HIDDEN) + EPS)
    if ROUNDS_FIRST:
        y = y.to(dtype).to(tl.float32)
    if weight is not None:
        y *= weight.to(tl.float32) + OFFSET
    if bias is not None:
        y += bias.to(tl.float32)
    tl.store(normed_ptr + written, y.to(dtype), mask)
