"""Programmatic dependent launch: a kernel's blocks start before the kernel ahead has ended.

From compute capability 9.0 on, a kernel launched so is on the device while the one before it
finishes. It waits there, and saves the time that a launch takes to reach the device. What it
loads before it waits arrives meanwhile.

    @triton.jit
    def _kernel(x_ptr, weight_ptr, ..., DEPENDENT: tl.constexpr):
        weight = tl.load(weight_ptr + ...)
        wait_for_kernel_ahead(DEPENDENT)
        x = tl.load(x_ptr + ...)

    _kernel[grid](x, weight, ..., **dependent_launch(x.device))

Before it waits, a kernel writes nothing, and reads only what the kernel ahead of it does not
write: the weights of the model, and what was uploaded for the step. Memory is handed from kernel
to kernel, so that even a result that nothing reads yet may lie where the kernel ahead still reads.
Every program waits, whatever work it has: then a kernel that has ended means that all kernels
before it have.
"""

from typing import TypedDict

import torch
import triton
import triton.language as tl

from kernels.target import target_of


class DependentLaunch(TypedDict, total=False):
    """Keyword arguments of a launch.

    DEPENDENT   a constant of the kernel: it has to wait
    launch_pdl  an option of Triton's; left out where there is no such launch
    """

    DEPENDENT: bool
    launch_pdl: bool


_ALONE = DependentLaunch(DEPENDENT=False)
_DEPENDENT = DependentLaunch(DEPENDENT=True, launch_pdl=True)


def dependent_launch(device: torch.device) -> DependentLaunch:
    """Return what to launch a kernel with that waits for the kernel ahead of it.

    GPUs below compute capability 9.0, and the interpreter, launch one kernel after the other.
    """
    can = can_launch_ahead(device) and not triton.knobs.runtime.interpret
    return _DEPENDENT if can else _ALONE


def can_launch_ahead(device: torch.device) -> bool:
    """Return whether the GPU starts a kernel before the one ahead of it has ended."""
    return target_of(device).capability >= 90


@triton.jit
def wait_for_kernel_ahead(DEPENDENT: tl.constexpr):
    """Wait until all kernels ahead have ended, then let the next kernel start.

    The next one's blocks find room as the last blocks of this one are running, and wait there.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
