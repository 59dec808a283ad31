"""A GPU of plywood: Triton compiles for it, and what is launched on it leaves zeros.

Triton's cache has an entry for each kernel, under a hash of
  - Triton itself: its sources, its library, and the version of its assembler;
  - the kernel's source, line number, callees and the constants they read;
  - the types of its arguments, which of them are 1 or multiples of 16, its constexprs;
  - the options it is launched with, and the GPU's compute capability;
  - some variables that change what the compiler does, none of them set as a rule.
Nothing of it is asked of a device but the capability. So Triton's own launch path, told of a
capability by this driver, makes the very entries that it looks for on such a GPU, provided
that the arguments are of the same types, alignments and strides. That is why the engine
itself launches them (`precompile.compile`), not a list of kernels that would grow old.

An entry names its files by absolute paths: the folder has to stay where it was filled.
"""

import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build
from triton.runtime.build import platform_key

from kernels.paged_attention.tuning import Target

TARGETS = {
    target.capability: target
    for target in (
        Target(80, 163 << 10, 108),  # A100
        Target(86, 99 << 10, 84),  # RTX 30, A10, A40
        Target(89, 99 << 10, 128),  # RTX 40, L4, L40S
        Target(90, 227 << 10, 132),  # H100, H200
        Target(100, 227 << 10, 148),  # B200
        Target(120, 99 << 10, 170),  # RTX 50, RTX PRO
    )
}
"""By compute capability. How many processors there are decides no entry."""


@contextmanager
def stage(target: Target) -> Iterator[None]:
    """Triton takes every tensor for one on such a GPU."""
    drivers = triton.runtime.driver
    before = drivers._active
    drivers.set_active(_Driver(target))
    try:
        with patch("kernels.paged_attention.kernel.target_of", lambda _: target):
            yield
    finally:
        drivers._active = before


class _Driver(DriverBase):
    def __init__(self, target: Target) -> None:
        self._target = target
        self.utils = self
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._target.capability, 32)

    def get_current_device(self) -> int:
        """Kernels remember by it what they have compiled."""
        return self._target.capability

    def get_current_stream(self, device: int) -> int:
        del device
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        del device
        return {"max_shared_mem": self._target.shared_bytes}

    def load_binary(self, *binary: object) -> tuple[int, int, int, int, int]:
        """Handles, registers and spills that nobody looks at; threads that a block may have."""
        del binary
        return 0, 0, 0, 0, 1024

    def map_python_to_cpp_type(self, ty: str) -> str:
        return nvidia.ty_to_cpp(ty)

    def get_active_torch_device(self) -> torch.device:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


class _Launcher:
    def __init__(self, source: object, metadata: object) -> None:
        """What Triton makes for each kernel."""

    def __call__(self, *grid_and_arguments: object) -> None:
        """Ids, positions, scores: 0 is a valid one of each."""
        for argument in grid_and_arguments:
            if isinstance(argument, torch.Tensor):
                argument.zero_()


def build_launcher() -> None:
    """Build Triton's own library of C, by which it launches: once for each entry it may have.

    It is linked to the GPU's driver, which comes with the GPU: an empty library stands for it.
    Its hash has the platform, in which Python counts `file`, the command, if it is installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder) / "libcuda.so.1"
        compiler = shutil.which("gcc") or "cc"
        options = ["-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null"]
        subprocess.run([compiler, *options, "-o", str(stub)], check=True)
        for linkage in ("", "ELF"):
            platform_key.cache_clear()
            with (
                patch.object(platform, "architecture", return_value=("64bit", linkage)),
                patch.object(build, "_load_module_from_path"),  # not without a driver
            ):
                build.compile_module_from_src(
                    src=(Path(nvidia.dirname) / "driver.c").read_text(),
                    name="cuda_utils",
                    library_dirs=[nvidia.libdevice_dir, folder],
                    include_dirs=nvidia.include_dirs,
                    libraries=nvidia.libraries,
                )
        platform_key.cache_clear()
