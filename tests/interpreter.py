"""Triton's interpreter on the CPU, with the two things that it lacks for bfloat16."""

import os
from typing import Any

import numpy as np
import torch

INTERPRETED = not torch.cuda.is_available()


def install() -> None:
    """Interpret every kernel. Call before anything imports Triton, which decides then.

    The interpreter keeps bfloat16 as the bits of it, and multiplies matrices of those bits
    as if they were numbers; here they become float32 first, as tensor cores have it.
    """
    if not INTERPRETED:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def constant(_: Any, value: float) -> Any:
        bits = np.array([value], dtype=np.float32).view(np.uint32) >> 16
        return TensorHandle(bits.astype(np.uint16), tl.bfloat16)

    create_dot = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(
        self, widened(a), widened(b), *rest
    )
    InterpreterBuilder.get_bf16 = constant
