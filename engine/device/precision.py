"""The types that a device computes in, and how exactly."""

import torch

_FIRST_WITH_BFLOAT16 = (8, 0)
"""The lowest compute capability whose tensor cores have it."""


def half_precision(device: torch.device) -> torch.dtype:
    """Return the type of 16 bits that the device is fast in: bfloat16, which has the range of
    float32, or float16 on a GPU without it.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FIRST_WITH_BFLOAT16:
        return torch.float16
    return torch.bfloat16


def sum_in_float32() -> None:
    """Have matrix products of 16 bits add up in float32 to the end, in this process.

    torch lets cuBLAS split a long sum and add the parts in 16 bits, as it does where there are few
    rows: the logits of a sequence would then differ more with the number of sequences beside it.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
