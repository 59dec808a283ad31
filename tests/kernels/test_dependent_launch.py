"""Kernels start early on GPUs that can, and do nothing there that they must wait for."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.dependent_launch import dependent_launch, wait_for_kernel_ahead
from kernels.target import Target, using_target
from tests.kernels.compiling import disassemble, positions


@triton.jit
def copy_scaled_kernel(x_ptr, scale_ptr, y_ptr, DEPENDENT: tl.constexpr):  # noqa: N803 (constants of kernels are in capitals)
    cols = tl.arange(0, 1024)
    scale = tl.load(scale_ptr + cols)
    wait_for_kernel_ahead(DEPENDENT)
    tl.store(y_ptr + cols, tl.load(x_ptr + cols) * scale)


@pytest.mark.parametrize("capability", [75, 80, 86, 89])
def test_older_gpus_launch_one_kernel_after_the_other(capability: int) -> None:
    with using_target(Target(capability, 99 << 10, 8)):
        assert dependent_launch(torch.device("cuda")) == {"DEPENDENT": False}


@pytest.mark.parametrize("capability", [90, 100, 120])
def test_newer_gpus_launch_ahead(capability: int) -> None:
    with using_target(Target(capability, 99 << 10, 8)):
        launch = dependent_launch(torch.device("cuda"))
    assert launch == {"DEPENDENT": True, "launch_pdl": True}


def test_a_kernel_runs_alike_under_the_interpreter() -> None:
    x, scale, y = torch.rand(1024), torch.rand(1024), torch.empty(1024)
    copy_scaled_kernel[(1,)](x, scale, y, **dependent_launch(x.device))
    assert torch.equal(y, x * scale)


@pytest.mark.slow
@pytest.mark.parametrize("target", [90, 100, 120])
def test_only_the_loads_before_the_wait_are_issued_before_it(target: int) -> None:
    code = disassembled(target, dependent=True)
    (wait,) = positions(code, "ACQBULK")
    (release,) = positions(code, "PREEXIT")
    loads = positions(code, r"LDG")
    assert [at < wait for at in loads] == [True, True, False, False]
    assert wait < release < positions(code, "STG")[0]


@pytest.mark.slow
def test_a_kernel_launched_alone_does_not_wait() -> None:
    assert not positions(disassembled(80, dependent=False), "ACQBULK|PREEXIT")


def disassembled(target: int, dependent: bool) -> list[str]:
    return disassemble(
        f"{__name__}.copy_scaled_kernel",
        dict.fromkeys(["x_ptr", "scale_ptr", "y_ptr"], "*fp32"),
        {"DEPENDENT": dependent},
        target=target,
    )
