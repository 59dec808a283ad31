"""A driver that has Triton compile for a GPU that is not present, and runs nothing.

Triton's cache has an entry for each compiled kernel, under a hash of
  - Triton itself: its sources, its library, and the version of its assembler;
  - the kernel's source, line number, callees and the constants they read;
  - the types of its arguments, which of them are 1 or multiples of 16, its constexprs;
  - the options it is launched with, and the GPU's compute capability;
  - some variables that change what the compiler does, none of them set as a rule.
The device contributes nothing but its compute capability. So Triton's own launch path, given
the capability by this driver, makes the very entries that it looks for on such a GPU, provided
that the arguments are of the same types, alignments and strides. That is why the engine itself
launches the kernels (`precompile.compile`): a list of kernels kept by hand would go out of date.

An entry names its files by absolute paths: the folder has to stay where it was filled.
"""

import hashlib
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build
from triton.runtime.cache import get_cache_manager

from kernels.target import Target, using_target

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
"""GPUs by compute capability. The number of processors changes no entry of the cache."""


_LARGEST_FILLED = 32 << 20
"""Bytes. For more than that the C library always asks the system for new memory."""


@contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Have Triton compile every kernel that is launched for this GPU, and run none.

    Kernels that are launched leave zeros in the tensors they are given.
    """
    drivers = triton.runtime.driver
    before = drivers._active
    drivers.set_active(_Driver(target))
    try:
        with using_target(target):
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
        """Return a number of its own for each target: kernels keep what they compiled under it."""
        return self._target.capability

    def get_current_stream(self, device: int) -> int:
        del device
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        del device
        return {"max_shared_mem": self._target.shared_bytes}

    def load_binary(self, *binary: object) -> tuple[int, int, int, int, int]:
        """Return two handles, registers and spills, all unused, and a block's most threads."""
        del binary
        return 0, 0, 0, 0, 1024

    def map_python_to_cpp_type(self, ty: str) -> str:
        return nvidia.ty_to_cpp(ty)

    def get_active_torch_device(self) -> torch.device:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


class _Launcher:
    """What Triton calls to launch a kernel, in place of the C function it compiles for a GPU."""

    def __init__(self, source: object, metadata: object) -> None:
        del source, metadata

    def __call__(self, *grid_and_arguments: object) -> None:
        """Fill tensors with zeros, which are valid token ids, positions and scores.

        Large ones stay: memory that was not written yet has zeros and takes no space, such as that
        of the weights of a model that is not downloaded yet.
        """
        for argument in grid_and_arguments:
            if isinstance(argument, torch.Tensor) and argument.nbytes <= _LARGEST_FILLED:
                argument.zero_()


def build_launcher() -> None:
    """Compile the C library through which Triton talks to NVIDIA's driver, and cache it.

    It is linked to libcuda, which only a machine with a GPU has: an empty library takes its
    place. Triton's key for it contains what Python's `platform` says of executables, which
    depends on whether the command `file` is installed, so the library is cached under both keys.
    """
    name, source = "cuda_utils", (Path(nvidia.dirname) / "driver.c").read_text()
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder) / "libcuda.so.1"
        compiler = shutil.which("gcc") or "cc"
        options = ["-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null"]
        subprocess.run([compiler, *options, "-o", str(stub)], check=True)
        path = Path(folder) / f"{name}.c"
        path.write_text(source)
        library = build._build(
            name,
            str(path),
            srcdir=folder,
            library_dirs=[nvidia.libdevice_dir, folder],
            include_dirs=nvidia.include_dirs,
            libraries=nvidia.libraries,
            ccflags=[],
        )
        content = Path(library).read_bytes()
    for linkage in ("", "ELF"):
        platform_key = ",".join([platform.machine(), platform.system(), "64bit", linkage])
        key = hashlib.sha256((source + platform_key).encode()).hexdigest()
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        get_cache_manager(key).put(content, f"{name}{suffix}", binary=True)
