"""What the engine asks of its device when something has failed, or may fail."""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Protocol

import torch


class Device(Protocol):
    def synchronize(self) -> None:
        """Wait for all that was launched. Raises RuntimeError if the device is lost, whatever the
        error was that has lost it.
        """

    def free_unused(self) -> None:
        """Give back the memory that nothing refers to any more."""

    def refusing_waits(self) -> AbstractContextManager[None]:
        """While it is active, whatever waits for the device raises RuntimeError, in all threads."""


class CpuDevice:
    """A CPU raises an error where it happens, and goes on after it."""

    def synchronize(self) -> None:
        pass

    def free_unused(self) -> None:
        gc.collect()

    def refusing_waits(self) -> AbstractContextManager[None]:
        return nullcontext()


class CudaDevice:
    def __init__(self, device: torch.device):
        self._device = device

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def free_unused(self) -> None:
        gc.collect()
        with suppress(RuntimeError):  # torch 2.11 refuses for good after a capture that failed
            torch.cuda.empty_cache()

    @contextmanager
    def refusing_waits(self) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def make_device(device: torch.device) -> Device:
    return CudaDevice(device) if device.type == "cuda" else CpuDevice()
