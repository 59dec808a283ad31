"""Compile kernels for GPUs that this machine need not have, and read the assembler's report.

Compilation runs in other processes, as Triton decides at import whether to interpret or compile.
"""

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Set as AbstractSet
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TARGETS = (80, 90, 100, 120)
"""Compute capabilities: 90 is 9.0."""
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that one block may have (CUDA programming guide, table 27)."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel uses: registers and stack bytes (spills) per thread, shared bytes per block."""

    registers: int
    stack: int
    shared: int


def compile_everywhere(
    kernel: str,
    arguments: dict[str, str],
    constants: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: AbstractSet[str] = frozenset(),
    targets: AbstractSet[int] = frozenset(TARGETS),
    maxnreg: int | None = None,
) -> dict[int, Resources]:
    """Compile `kernel`, by its full name, for each of `targets`.

    `arguments` are Triton types by name ("*bf16", "i32"); pointers, and the integers named
    in `divisible`, are taken as multiples of 16, as the launcher finds them for real shapes.
    `maxnreg` is the most registers of a thread; None leaves it to the assembler.
    """
    futures = {
        target: workers().submit(
            _compile,
            target,
            kernel,
            arguments,
            constants,
            num_warps,
            num_stages,
            divisible,
            maxnreg,
        )
        for target in sorted(targets)
    }
    return {target: future.result() for target, future in futures.items()}


def disassemble(
    kernel: str,
    arguments: dict[str, str],
    constants: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: AbstractSet[str] = frozenset(),
    target: int = 90,
) -> list[str]:
    """Return the machine instructions of a kernel in their order, compiled as above.

    They are as NVIDIA's disassembler writes them, such as "LDG.E.128 R4, desc[UR4][R2.64]".
    """
    compiling = workers().submit(
        _disassemble, target, kernel, arguments, constants, num_warps, num_stages, divisible
    )
    return compiling.result()


def positions(instructions: list[str], pattern: str) -> list[int]:
    """Return where the instructions are that match a regular expression somewhere."""
    return [at for at, text in enumerate(instructions) if re.search(pattern, text)]


@cache
def workers() -> ProcessPoolExecutor:
    """Return processes that compile: they import Triton with the first kernel they receive."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(os.cpu_count(), spawn, initializer=_do_not_interpret)


def _do_not_interpret() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _compile(target: int, *kernel: Any) -> Resources:
    compiled = _build(target, *kernel)
    report = _inspect(compiled, "cuobjdump", "-res-usage")
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", report)}
    return Resources(usage["REG"], usage["STACK"], compiled.metadata.shared)


def _disassemble(target: int, *kernel: Any) -> list[str]:
    listing = _inspect(_build(target, *kernel), "cuobjdump", "-sass")
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(\S.*?)\s*;", listing, re.MULTILINE)


def _inspect(compiled: Any, tool: str, option: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run(
            [folder / tool, option, file.name], capture_output=True, text=True, check=True
        ).stdout


def _build(
    target: int,
    kernel: str,
    arguments: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
    divisible: AbstractSet[str],
    maxnreg: int | None = None,
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, function = kernel.rpartition(".")
    jitted = getattr(importlib.import_module(module), function)
    names = jitted.arg_names
    if "DEPENDENT" in names:
        constants = {"DEPENDENT": target >= 90} | constants
    attrs = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in arguments.items()
        if kind.startswith("*") or name in divisible
    }
    source = ASTSource(
        fn=jitted,
        signature={name: arguments.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs=attrs,
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
