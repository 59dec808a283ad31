"""Kernels that make a GPU unusable for the process that launches them."""

import torch
import triton
import triton.language as tl

NOWHERE = 1 << 46
"""An address that no process has mapped."""


@triton.jit
def write_kernel(address):  # type: ignore[no-untyped-def]
    tl.store(address.to(tl.pointer_type(tl.int32)), 1)


@triton.jit
def spin_kernel(flag):  # type: ignore[no-untyped-def]
    while tl.load(flag, volatile=True) == 0:
        pass


def illegal_address() -> None:
    """Write where nothing is. The launch succeeds; what waits for the device gets the error."""
    write_kernel[(1,)](NOWHERE)


def wrong_index() -> None:
    """Have a kernel of torch find an index out of range, which is an assertion on the device."""
    row = torch.zeros(1, device="cuda")
    row[torch.tensor([1 << 30], device="cuda")]


def endless_kernel() -> None:
    """Launch a kernel that does not end. All that follows on this stream waits for it."""
    spin_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device="cuda"))
