"""Linears of few rows run in the kernel that a measurement at load finds faster."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.core.config import EngineConfig
from engine.engine import Engine
from engine.linear.gemv import GemvLinear, use_gemv
from engine.linear.merged import merge
from engine.linear.replace import Linear, replace_linears
from kernels.gemv import gemv_torch
from kernels.ops import TORCH, TRITON, Ops
from tests.engine.driving import check_greedy, greedy, run
from tests.engine.models import FUSED, prepared, reference
from tests.engine.recording import capture, recorded

Cost = Callable[[int, int], float | None]


class Bench:
    """Times work by what it calls: the library takes a second, and ours what `cost` says.

    `cost` is called with the outputs of the linear and the number of rows.
    """

    def __init__(self, cost: Cost, ops: Ops = TORCH):
        self._cost = cost
        self.ops = replace(ops, gemv=self._gemv)
        self.calls: list[tuple[int, int]] = []
        self.num_timed = 0

    def _gemv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, prefetches: bool = False
    ) -> Tensor:
        self.calls.append((len(weight), x.numel() // x.shape[-1]))
        return gemv_torch(x, weight, bias, prefetches)

    def timer(self, work: Callable[[], object]) -> float | None:
        self.num_timed += 1
        self.calls.clear()
        work()
        return self._cost(*self.calls[0]) if self.calls else 1.0


def always(seconds: float | None) -> Cost:
    return lambda *_: seconds


def served(model: nn.Module, cost: Cost) -> Bench:
    bench = Bench(cost)
    use_gemv(model, bench.ops, bench.timer)
    bench.calls.clear()
    return bench


def rows_in_our_kernel(linear: nn.Module, bench: Bench, num_in: int) -> list[int]:
    counts = []
    for num_rows in range(12):
        bench.calls.clear()
        linear(torch.randn(1, num_rows, num_in))
        counts += [num_rows] * len(bench.calls)
    return counts


@pytest.mark.parametrize("seconds", [1.0, 0.98, 2.0, None])
def test_the_library_stays_unless_it_is_clearly_slower(seconds: float | None) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    served(model, always(seconds))
    assert type(model[0]) is nn.Linear


def test_a_number_of_rows_is_computed_as_the_next_that_was_timed() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    bench = served(model, lambda _, rows: 0.5 if rows in (1, 4) else 2.0)
    assert rows_in_our_kernel(model, bench, 8) == [1, 3, 4]


def test_more_than_eight_rows_and_none_are_the_library_s() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    bench = served(model, always(0.5))
    assert rows_in_our_kernel(model, bench, 8) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_each_shape_has_its_own_choice_that_holds_from_then_on() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 4))
    bench = served(model, lambda outputs, _: 0.5 if outputs == 4 else 2.0)
    assert [type(linear) for linear in model] == [GemvLinear, nn.Linear, GemvLinear]
    num_timed = bench.num_timed
    assert num_timed == 2 * 4 * 2, "two shapes, four numbers of rows, two ways"
    model(torch.randn(1, 1, 8))
    assert bench.calls == [(4, 1), (4, 1)]
    assert bench.num_timed == num_timed


def test_what_the_kernel_cannot_compute_is_the_library_s() -> None:
    class Shift(nn.Linear):
        pass

    model = nn.Sequential(
        nn.Linear(7, 8), Shift(8, 8), nn.Linear(8, 8, dtype=torch.float64), nn.LayerNorm(8)
    )
    kinds = [type(module) for module in model]
    bench = served(model, always(0.1))
    assert [type(module) for module in model] == kinds
    assert bench.num_timed == 0


@pytest.mark.parametrize("bias", [False, True])
def test_it_computes_what_the_linear_did(bias: bool) -> None:
    linear = nn.Linear(16, 12, bias).requires_grad_(False)
    model = nn.Sequential(linear)
    served(model, always(0.5))
    assert isinstance(model[0], Linear)
    for shape in [(16,), (1, 1, 16), (1, 5, 16), (2, 3, 16), (30, 16), (1, 0, 16)]:
        x = torch.randn(*shape)
        torch.testing.assert_close(model(x), linear(x))
    assert model[0].weight is linear.weight


def test_merged_linears_are_one() -> None:
    first, second = (nn.Linear(8, size, False).requires_grad_(False) for size in (4, 12))
    model = nn.ModuleDict({"a": first, "b": second})
    expected = [F.linear(torch.ones(1, 8), linear.weight) for linear in (first, second)]
    replace_linears(model, merge([first, second]).get)
    bench = served(model, always(0.5))
    x = torch.ones(1, 8)
    torch.testing.assert_close([model["a"](x), model["b"](x)], expected)
    assert bench.calls == [(16, 1)]


def test_the_choice_is_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8, False))
    with caplog.at_level(logging.INFO, "engine.linear.gemv"):
        served(model, lambda outputs, rows: 0.9 if (outputs, rows) < (8, 4) else 1.0)
        served(nn.Sequential(), always(1.0))
    assert caplog.messages == [
        "linears of few rows in our own kernel: "
        "4x8 with bias at 1 (90%), 2 (90%), 4 (90%), 8 (90%); 8x4 at 1 (90%), 2 (90%)",
        "linears of few rows in our own kernel: none",
    ]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "mixtral"])
def test_a_model_says_the_same(name: str) -> None:
    """Models whose linears read activations and norms that are computed late are among them."""
    bench = Bench(always(0.5), FUSED)
    loaded = prepared(name, bench.ops, timer=bench.timer)
    assert any(isinstance(module, GemvLinear) for module in loaded.model.modules())
    bench.calls.clear()
    engine = Engine(loaded, EngineConfig(max_sequences=4, max_batch_tokens=64, num_blocks=64))
    request = greedy(b"once upon a time", 6)
    check_greedy(reference(name), run(engine, [(0, request)]), request)
    assert {rows for _, rows in bench.calls} == {1}


@pytest.mark.slow
def test_captured_steps_replay_our_kernel() -> None:
    bench = Bench(always(0.5), TRITON)
    ops = recorded(replace(TRITON, gemv=bench.ops.gemv))
    loaded = prepared("llama", ops, timer=bench.timer, num_hidden_layers=2)
    recordings = []

    def remember(work: Callable[[], object]) -> object:
        recordings.append(capture(work))
        return recordings[-1]

    config = EngineConfig(max_sequences=4, max_batch_tokens=64, num_blocks=64)
    engine = Engine(loaded, config, capture=partial(remember))  # type: ignore[arg-type]
    request = greedy(b"once upon a time", 6)
    check_greedy(reference("llama", num_hidden_layers=2), run(engine, [(0, request)]), request)
    names = [[call.name for call in recording.launches] for recording, _ in recordings]
    assert any(of_graph.count("_gemv") == 2 * 4 + 1 for of_graph in names), names
