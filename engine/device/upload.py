"""Brings bytes from files to a device: read into pinned memory, and copied from there while the
next ones are read.

A copy from pageable memory first goes to a small pinned buffer of the driver's, and the thread
waits for it: a few GB/s. Here a thread fills one buffer while the device takes the other.
"""

import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

_BUFFER_BYTES = 8 << 20
"""Of each buffer: enough that the launch of a copy takes no part of its time."""

Read = Callable[[Tensor, int], None]
"""Fills a buffer [n] uint8 on the host with the n bytes that begin at an offset."""


class Copy(Protocol):
    """A copy that was started."""

    def wait(self) -> None:
        """Return when the copy is done, and its source may be changed."""


class Copies(Protocol):
    """Copies from the host to a device, done in the order in which they are started."""

    def buffer(self, num_bytes: int) -> Tensor:
        """Return a buffer on the host to copy from, [num_bytes] uint8."""

    def begin(self) -> None:
        """Order the copies to come behind what was launched on the device before."""

    def start(self, source: Tensor, target: Tensor) -> Copy:
        """Start to copy `source`, in a buffer, to `target` of the same shape and any type."""

    def end(self) -> None:
        """Order what is launched on the device from now on behind all copies."""


class CudaCopies:
    """Copies on a stream of its own, beside whatever else the GPU does."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def begin(self) -> None:
        # Memory that was freed on the usual stream may be the target's, and still be in use there.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def start(self, source: Tensor, target: Tensor) -> Copy:
        with torch.cuda.stream(self._stream):
            if source.dtype != target.dtype:
                # Converted on the device: `copy_` alone would do it on the host, and wait.
                source = source.to(self._device, non_blocking=True)
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # one that waits leaves the core to others
            done.record()
        return _CudaCopy(done)

    def end(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class _CudaCopy:
    def __init__(self, done: torch.cuda.Event):
        self._done = done

    def wait(self) -> None:
        self._done.synchronize()


class Uploads:
    """Fills tensors on a device. Any number of threads may do so, each has buffers of its own."""

    def __init__(self, make_copies: Callable[[], Copies], buffer_bytes: int = _BUFFER_BYTES):
        self._make_copies = make_copies
        self._buffer_bytes = buffer_bytes
        self._of_thread = threading.local()

    def fill(self, target: Tensor, dtype: torch.dtype, read: Read) -> None:
        """Fill `target`, contiguous on the device, with as many values of type `dtype`, converted
        to the target's type. `read` is called for one piece after the other.

        What is launched on the device afterwards finds the values there. Raises what `read` raises.
        """
        lane = self._lane()
        flat, width = target.view(-1), self._buffer_bytes // dtype.itemsize
        lane.copies.begin()
        try:
            for start in range(0, len(flat), width):
                lane.send(flat[start : start + width], dtype, read, start * dtype.itemsize)
        finally:
            lane.copies.end()

    def _lane(self) -> "_Lane":
        lane: _Lane | None = getattr(self._of_thread, "lane", None)
        if lane is None:
            lane = self._of_thread.lane = _Lane(self._make_copies(), self._buffer_bytes)
        return lane


class _Lane:
    """Two buffers, filled in turn. One is filled again when the copy from it is done."""

    def __init__(self, copies: Copies, buffer_bytes: int):
        self.copies = copies
        self._free = [copies.buffer(buffer_bytes) for _ in range(2)]
        self._taken: list[tuple[Copy, Tensor]] = []

    def send(self, target: Tensor, dtype: torch.dtype, read: Read, offset: int) -> None:
        buffer = self._next_buffer()
        source = buffer[: len(target) * dtype.itemsize]
        try:
            read(source, offset)
            copy = self.copies.start(source.view(dtype), target)
        except BaseException:
            self._free.append(buffer)
            raise
        self._taken.append((copy, buffer))

    def _next_buffer(self) -> Tensor:
        if self._free:
            return self._free.pop()
        copy, buffer = self._taken.pop(0)
        copy.wait()
        return buffer
