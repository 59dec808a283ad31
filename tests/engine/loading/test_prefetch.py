"""Weights are prefetched where that makes a whole decode step faster."""

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from engine.core.errors import LoadError
from engine.linear.gemv import GemvLinear
from kernels.gemv import gemv_torch
from kernels.target import Target, using_target
from tests.engine.models import FUSED, prepared

WIDE: dict[str, Any] = {"hidden_size": 640, "intermediate_size": 1024, "num_hidden_layers": 2}
ATTENTION_OUT, DOWN = (640, 640), (640, 1024)


@pytest.fixture
def hopper() -> Iterator[None]:
    with using_target(Target(90, 227 << 10, 132)):
        yield


class Scripted:
    """Times linears so that ours is chosen, and decode steps by the linears that prefetch."""

    def __init__(self, step_seconds: Callable[[set[tuple[int, int]]], float | None]):
        self.ops = replace(FUSED, gemv=self._gemv)
        self._step_seconds = step_seconds
        self._prefetching: set[tuple[int, int]] = set()
        self._shapes: set[tuple[int, int]] = set()
        self.steps: list[set[tuple[int, int]]] = []

    def _gemv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, prefetches: bool = False
    ) -> Tensor:
        shape = weight.shape[0], weight.shape[1]
        self._shapes.add(shape)
        if prefetches:
            self._prefetching.add(shape)
        return gemv_torch(x, weight, bias)

    def timer(self, work: Callable[[], object]) -> float | None:
        self._shapes, self._prefetching = set(), set()
        work()
        if len(self._shapes) < 2:  # linears of one shape
            return 0.5 if self._shapes else 1.0
        self.steps.append(self._prefetching)
        return self._step_seconds(self._prefetching)


def prefetching(timer: Scripted) -> set[tuple[int, int]]:
    model = prepared("llama", timer.ops, timer=timer.timer, **WIDE).model
    linears = [module for module in model.modules() if isinstance(module, GemvLinear)]
    shapes = [linear.weight.shape for linear in linears if linear.prefetches]
    return {(outputs, inputs) for outputs, inputs in shapes}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("gains", [{ATTENTION_OUT}, {ATTENTION_OUT, DOWN}, {DOWN}, set()])
def test_linears_prefetch_where_the_step_gains(gains: set[tuple[int, int]]) -> None:
    timer = Scripted(lambda active: 1.0 - 0.1 * len(active & gains) + 0.05 * len(active - gains))
    assert prefetching(timer) & {ATTENTION_OUT, DOWN} == gains
    assert timer.steps[0] == set()
    assert {ATTENTION_OUT} in timer.steps


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("seconds", [1.0, None])
def test_a_gain_that_cannot_be_measured_is_none(seconds: float | None) -> None:
    assert prefetching(Scripted(lambda _: seconds)) == set()


def test_older_gpus_do_not_prefetch() -> None:
    timer = Scripted(lambda _: 1.0)
    assert prefetching(timer) == set()
    assert timer.steps == []


@pytest.mark.usefixtures("hopper")
def test_the_choice_is_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    timer = Scripted(lambda active: 0.9 if active == {DOWN} else 1.0)
    with caplog.at_level(logging.INFO, "engine.loading.prefetch"):
        prefetching(timer)
    own = [r.getMessage() for r in caplog.records if r.name == "engine.loading.prefetch"]
    assert own == ["linears that prefetch their weights: 640x1024 (90.0% of a decode step's time)"]


@pytest.mark.parametrize("wrong_rows", [1, 2, 4, 8])
def test_a_kernel_for_few_rows_that_computes_something_else_is_found(wrong_rows: int) -> None:
    def wrong(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, prefetches: bool = False
    ) -> Tensor:
        result = gemv_torch(x, weight, bias, prefetches)
        return result * 1.5 if x.shape[:-1].numel() == wrong_rows else result

    timer = Scripted(lambda _: 1.0)
    with pytest.raises(LoadError, match="off by"):
        prepared("llama", replace(timer.ops, gemv=wrong), timer=_in_favour_of_ours(), **WIDE)


def _in_favour_of_ours() -> Callable[[Callable[[], object]], float]:
    """Time every second work, which is that of the library, as twice as long."""
    seconds = itertools.cycle([1.0, 2.0])
    return lambda _: next(seconds)
