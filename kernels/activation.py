"""The product in the middle of a gated MLP: act(gate) * up.

The Triton kernel follows torch's CUDA kernels operation by operation, down to how CUDA's math
library computes exp and tanh, because half a unit in the last place of float32 is enough to
turn the last bit of a bfloat16 now and then. The torch op is what transformers calls, and takes
its exp and erf from whichever library torch chooses for the device, type and layout.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import dependent_launch, wait_for_kernel_ahead

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
"""The activations of gated MLPs: silu nearly everywhere (transformers also calls it "swish"),
gelu_tanh in gemma ("gelu_pytorch_tanh"), gelu in gemma's first configs, relu in sparse llamas,
relu2 in bitnet."""

_BLOCK = 1024


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the activation of that name."""
    return ACTIVATIONS[activation](x)


def act_mul_torch(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return act(gate), rounded to its type, times `up`, as a contiguous tensor.

    gate, up  [..., n], any strides
    """
    return (activate(gate, activation) * up).contiguous()


def act_mul_triton(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Do what `act_mul_torch` does, in one launch.

    Rows must be contiguous and lie at one stride from each other, as the halves of a fused
    projection do.

    Reads gate and up once and writes as much as one of them: 3 * rows * n elements.
    """
    n = gate.shape[-1]
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = gate.view(-1, n), up.view(-1, n)
    assert gate.stride(1) == up.stride(1) == 1
    _act_mul_kernel[(gate.shape[0] * triton.cdiv(n, _BLOCK),)](
        gate,
        gate.stride(0),
        up,
        up.stride(0),
        output,
        N=n,
        ACTIVATION=activation,
        BLOCK=_BLOCK,
        num_warps=4,
        **dependent_launch(gate.device),
    )
    return output


@triton.jit
def _act_mul_kernel(
    gate_ptr,
    gate_stride,
    up_ptr,
    up_stride,
    output_ptr,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    blocks: tl.constexpr = triton.cdiv(N, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    wait_for_kernel_ahead(DEPENDENT)
    # Without the barrier, the assembler puts off `up` until the activation is computed, whose
    # wait for `gate` would be followed by another for `up`.
    up = tl.load(up_ptr + row * up_stride + cols, mask, 0.0).to(tl.float32)
    tl.debug_barrier()
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask, 0.0).to(tl.float32)
    activated = activated_in_float32(gate, ACTIVATION)
    activated = activated.to(output_ptr.dtype.element_ty).to(tl.float32)
    product = (activated * up).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + row * N + cols, product, mask)


@triton.jit
def activated_in_float32(gate, ACTIVATION: tl.constexpr):
    """Apply the activation to float32, as torch's CUDA kernels do; the caller rounds the result."""
    if ACTIVATION == "silu":
        activated = tl.div_rn(gate, 1.0 + exp_float32(-gate))
    elif ACTIVATION == "gelu":
        activated = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = tl.clamp(gate, -20.0, 20.0)  # tanh is flat there, and no cube overflows
        inner = 0.7978845608028654 * tl.fma(x * x * x, 0.044715, x)
        activated = 0.5 * gate * (1.0 + _tanh(inner))
    else:
        activated = tl.where(gate < 0, 0.0, gate)
        if ACTIVATION == "relu2":
            activated *= activated
    return activated


@triton.jit
def exp_float32(x):
    """Return e^x as CUDA's expf computes it.

    `tl.exp` rounds x * log2(e) once, which costs a large x its last bits. Below the clamp, e^x
    vanishes beside the 1 that the caller adds; above it, e^x is infinite.
    """
    bounded = tl.clamp(x, -87.0, 88.7228)
    whole = tl.minimum(tl.floor(bounded * 1.4426950216293335), 126.0)
    part = tl.fma(bounded, 1.4426950216293335, -whole)
    part = tl.fma(bounded, 1.925963033500011e-08, part)
    power = ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x > 88.7228, float("inf"), tl.exp2(part) * power)


@triton.jit
def _tanh(x):
    """Return tanh(x) as CUDA's tanhf computes it: a polynomial near 0, else from e^2|x|."""
    square = x * x
    near = tl.fma(0.01573968306183815, square, -0.05230396240949631)
    near = tl.fma(near, square, 0.13315297663211823)
    near = tl.fma(near, square, -0.33332768082618713)
    near = tl.fma(near * square, x, x)
    size = tl.minimum(tl.abs(x), 10.0)
    far = 1.0 - 2.0 / (tl.exp2(size * 2.885390043258667) + 1.0)
    return tl.where(size < 0.6, near, tl.where(x < 0, -far, far))
