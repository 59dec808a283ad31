"""Triton's interpreter on the CPU, with bfloat16 corrected."""

import os
from typing import Any

import numpy as np
import torch

INTERPRETED = not torch.cuda.is_available()


def install() -> None:
    """Have Triton interpret every kernel. Call this before the first import of Triton.

    The interpreter keeps bfloat16 as integers of the same bits. It multiplies matrices of these
    integers, where tensor cores widen the numbers; it truncates float32 to bfloat16, where
    GPUs round to the nearest, ties to even; and it is wrong about subnormal numbers.

    It also patches Triton's language at every call from a kernel to a function and restores it
    afterwards, which takes half of its time: here the language stays patched.
    """
    if not INTERPRETED:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from triton import language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(data: np.ndarray) -> Any:
        bits = data.astype(np.float32).view(np.uint32)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        nearest = np.where(is_nan, bits | 0x400000, bits + 0x7FFF + (bits >> 16 & 1))
        return TensorHandle((nearest >> 16).astype(np.uint16), tl.bfloat16)

    def cast(builder: Any, source: Any, dtype: Any) -> Any:
        match source.dtype.scalar, dtype.scalar:
            case tl.float32, tl.bfloat16:
                return rounded(source.data)
            case tl.bfloat16, tl.float32:
                return widened(source)
        return cast_impl(builder, source, dtype)

    patched: set[str] = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        module = function.fn.__module__
        if module not in patched:
            patched.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(
        self, widened(a), widened(b), *rest
    )
    InterpreterBuilder.get_bf16 = lambda _, value: rounded(np.array([value]))
