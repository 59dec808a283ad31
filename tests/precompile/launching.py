"""Launches kernels on a GPU that is not present, and prints for each whether it was in the cache.

    python -m tests.precompile.launching fake|cuda [SHIPPED]

`fake` launches through the driver of `precompile`. `cuda` launches through Triton's own driver
for NVIDIA's GPUs, with only those parts mocked that load and run a kernel on the GPU. SHIPPED is
a second folder in which compiled kernels are looked for.

This is a process of its own because Triton decides at its import whether it compiles or
interprets, and keeps in memory what it has compiled.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch
import triton
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver

from kernels import compiled, fused_sampling
from kernels.norm import NormForm, norm_triton
from kernels.target import using_target
from kernels.token_mask import mask_tokens_triton
from precompile.fake_driver import TARGETS, compiling_for

TARGET = TARGETS[90]


def cuda_driver() -> CudaDriver:
    driver = CudaDriver.__new__(CudaDriver)
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda _: 0
    driver.get_device_capability = lambda _: divmod(TARGET.capability, 10)
    driver.utils = Mock()
    driver.utils.get_device_properties.return_value = {"max_shared_mem": TARGET.shared_bytes}
    driver.utils.load_binary.return_value = 0, 0, 0, 0, 1024
    driver.launcher_cls = Mock()
    return driver


def launch() -> None:
    norm_triton(torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(64), None, NormForm(1e-5))
    logits = torch.zeros(2, 5000, dtype=torch.bfloat16)
    fused_sampling.greedy(logits, want_logprobs=False)
    mask_tokens_triton(logits, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 157).int())


def main(driver: str, shipped: str | None = None) -> None:
    if shipped is not None:
        compiled.SHIPPED = Path(shipped)
        knobs.cache.manager_class = compiled.CompiledKernels
    found: dict[str, bool] = {}

    def listen(src: Any, cache_hit: bool, **_: object) -> None:
        found[src.name] = cache_hit

    knobs.compilation.listener = listen
    if driver == "fake":
        with compiling_for(TARGET):
            launch()
    else:
        triton.runtime.driver.set_active(cuda_driver())
        with using_target(TARGET):  # which torch tells on such a GPU
            launch()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
