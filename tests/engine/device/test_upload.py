"""All bytes reach the device, and no buffer is filled again before the copy from it is done."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from engine.device.upload import Uploads

BUFFER_BYTES = 64


@dataclass(eq=False)
class LateCopies:
    """Copies that are done as late as they may be: when someone waits for them, or at the end.

    What a buffer has at that time is what arrives.
    """

    buffers: list[Tensor] = field(default_factory=list)
    begun: bool = False
    waiting: list["LateCopy"] = field(default_factory=list)

    def buffer(self, num_bytes: int) -> Tensor:
        self.buffers.append(torch.zeros(num_bytes, dtype=torch.uint8))
        return self.buffers[-1]

    def begin(self) -> None:
        self.begun = True

    def start(self, source: Tensor, target: Tensor) -> "LateCopy":
        assert self.begun
        self.waiting.append(LateCopy(self, source, target))
        return self.waiting[-1]

    def end(self) -> None:
        self.finish(len(self.waiting))
        self.begun = False

    def finish(self, count: int) -> None:
        for copy in self.waiting[:count]:
            copy.target.copy_(copy.source)
        del self.waiting[:count]


@dataclass(eq=False)
class LateCopy:
    copies: LateCopies
    source: Tensor
    target: Tensor

    def wait(self) -> None:
        if self in self.copies.waiting:
            self.copies.finish(self.copies.waiting.index(self) + 1)


def reading(values: Tensor) -> Callable[[Tensor, int], None]:
    """Return what reads the bytes of `values`, as they would lie in a file."""
    stored = values.contiguous().view(-1).view(torch.uint8)

    def read(buffer: Tensor, offset: int) -> None:
        buffer.copy_(stored[offset : offset + len(buffer)])

    return read


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(1,), (15,), (16,), (17,), (5, 7, 11), (300, 3), (0, 4), ()])
def test_all_values_arrive_in_the_target_s_type(
    shape: tuple[int, ...], dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    values = torch.randn(shape).mul(50).to(dtype)
    uploads = Uploads(LateCopies, BUFFER_BYTES)
    target = torch.full(shape, 99, dtype=target_dtype)
    uploads.fill(target, dtype, reading(values))
    assert torch.equal(target, values.to(target_dtype))


def test_a_thread_has_two_buffers_whatever_it_copies() -> None:
    made: list[LateCopies] = []

    def make() -> LateCopies:
        made.append(LateCopies())
        return made[-1]

    uploads = Uploads(make, BUFFER_BYTES)
    for length in (1, 1000, 33, 5000):
        values = torch.randn(length)
        target = torch.empty(length)
        uploads.fill(target, values.dtype, reading(values))
        assert torch.equal(target, values)
    assert [len(copies.buffers) for copies in made] == [2]


def test_threads_do_not_share_buffers() -> None:
    uploads = Uploads(LateCopies, BUFFER_BYTES)
    tensors = [torch.randn(900 + i) for i in range(40)]

    def upload(values: Tensor) -> Tensor:
        target = torch.empty_like(values)
        uploads.fill(target, values.dtype, reading(values))
        return target

    with ThreadPoolExecutor(4) as pool:
        for values, target in zip(tensors, pool.map(upload, tensors), strict=True):
            assert torch.equal(values, target)


def test_after_a_failed_read_the_thread_goes_on() -> None:
    uploads = Uploads(LateCopies, BUFFER_BYTES)
    values = torch.randn(200)

    def fails_late(buffer: Tensor, offset: int) -> None:
        if offset > 3 * BUFFER_BYTES:
            raise OSError("cut short")
        reading(values)(buffer, offset)

    for _ in range(5):
        with pytest.raises(OSError, match="cut short"):
            uploads.fill(torch.empty(200), values.dtype, fails_late)
    target = torch.empty(200)
    uploads.fill(target, values.dtype, reading(values))
    assert torch.equal(target, values)
