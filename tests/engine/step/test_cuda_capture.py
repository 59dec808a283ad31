"""How a CUDA graph is captured, on a device that only writes down what it is asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from engine.step.graphs import CudaCapture


class FakeCuda:
    """Stands for `torch.cuda`. A capture ends with an error if an operation in it was refused."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = "default"
        self.pools = 0
        self.is_refused = False
        outer = self

        class CUDAGraph:
            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                outer.log.append(f"begin in pool {pool} on {outer.current}")
                assert capture_error_mode == "thread_local"

            def capture_end(self) -> None:
                outer.log.append("end")
                if outer.is_refused:
                    raise RuntimeError("capture was invalidated")

        self.CUDAGraph = CUDAGraph
        self.Stream = lambda: "capturing"

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def empty_cache(self) -> None:
        self.log.append("flush")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    names = ("CUDAGraph", "Stream", "empty_cache", "graph_pool_handle", "stream", "synchronize")
    for name in names:
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_the_caches_are_flushed_once_before_many_captures(cuda: FakeCuda) -> None:
    capture = CudaCapture()
    assert [capture(lambda i=i: i)[1] for i in range(3)] == [0, 1, 2]  # type: ignore[misc]
    assert cuda.log.count("flush") == 1
    assert cuda.log.index("flush") < cuda.log.index("begin in pool 1 on capturing")
    assert cuda.log.count("begin in pool 1 on capturing") == cuda.log.count("end") == 3
    assert cuda.current == "default"


def raising(error: Exception, cuda: FakeCuda, is_refused: bool) -> Any:
    def work() -> None:
        cuda.is_refused = is_refused
        raise error

    return work


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_capture_that_fails_is_ended_and_raises_the_first_error(
    cuda: FakeCuda, is_refused: bool
) -> None:
    capture = CudaCapture()
    with pytest.raises(ValueError, match="in the model"):
        capture(raising(ValueError("in the model"), cuda, is_refused))
    assert cuda.log[-1] == "end"
    assert cuda.current == "default"
    cuda.is_refused = False
    capture(lambda: None)
    assert "begin in pool 2 on capturing" in cuda.log, "the pool of a failed capture is left"


def test_a_capture_that_ends_with_an_error_raises_it(cuda: FakeCuda) -> None:
    cuda.is_refused = True
    with pytest.raises(RuntimeError, match="invalidated"):
        CudaCapture()(lambda: None)
    assert cuda.current == "default"


def test_graphs_still_share_a_pool_after_memory_ran_out(cuda: FakeCuda) -> None:
    capture = CudaCapture()
    with pytest.raises(torch.OutOfMemoryError):
        capture(raising(torch.OutOfMemoryError("full"), cuda, is_refused=False))
    capture(lambda: None)
    assert cuda.log.count("begin in pool 1 on capturing") == 2
