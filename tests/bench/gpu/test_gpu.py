"""The GPU benchmark as a program: every section runs, here on the CPU; nothing is ever lost."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import (
    device,
    expert_cases,
    kernel_cases,
    models,
    sections,
    workloads,
)
from bench.gpu.__main__ import main, new_run
from bench.gpu.bounds import Rates
from bench.gpu.device import Timer
from bench.gpu.kernel_cases import Setting
from bench.gpu.run import (
    DeviceLost,
    NothingToMeasure,
    Run,
    Section,
)
from bench.gpu.scales import FULL, QUICK, TINY
from bench.gpu.stage import Stage
from bench.gpu.steps import Steps
from bench.gpu.workloads import (
    Workload,
    mixed,
    uniform,
    warm,
)
from bench.workload import LengthMix, LoadPlan, make_prompts
from engine.core.config import EngineConfig
from engine.core.request import SamplingParams
from engine.engine import Engine
from engine.loading.sizing import decide_limits
from kernels import fused_sampling
from kernels.ops import TORCH, TRITON, Ops
from tests.engine.models import prepared
from tests.engine.recording import capture, recorded, recorded_kernel

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def result_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def tiny_run(folder: Path, **scale: Any) -> Run:
    run = new_run(CPU, replace(TINY, **scale), folder)
    run.figures["ceilings"] = {"gb_per_s": 1.0, "tflops": 0.001}
    return run


# -- the whole program ---------------------------------------------------------------------


def test_every_section_runs_and_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    figures = result_of(tmp_path)
    assert figures["errors"] == {}
    assert figures["skipped"] == []
    assert {"device", "versions", "ceilings", "kernels"} <= figures.keys()
    assert figures["ceilings"]["gb_per_s"] > 0
    check_steps(figures)
    of_a_step = len(TINY.kernel_batches) * (10 + 5)  # kernels and GEMMs
    decodes = len(TINY.kernel_batches) * len(TINY.kernel_contexts) * 2  # with two types of cache
    attention = decodes + len(TINY.kernel_prompts)
    experts = len(TINY.kernel_batches) * 2  # ours and torch's
    few_rows, cublaslt = 4 * 2 * 5, 3 * 5
    expected = of_a_step + attention + experts + few_rows + cublaslt
    assert len(figures["kernels"]) == expected
    (mixed,) = figures["mixed"]
    assert (mixed["tokens"], mixed["decodes"]) == TINY.mixed_step[:2]
    assert min(mixed["host_ms"], mixed["step_ms"]) > 0
    check_engine(figures)
    check_workloads(figures)
    (start,) = figures["cold_start"]
    assert 0 < start["first_token_s"] <= start["prepared_s"]
    assert {"start", "import", "load", "verify", "warm-up"} <= start["phases"].keys()
    assert "| goal | asked | measured | met |" in capsys.readouterr().out


def check_steps(figures: dict[str, Any]) -> None:
    points = {(row["model"], row["batch"], row["context"]) for row in figures["decode"]}
    of_first = {("tiny", b, c) for b in TINY.points.batches for c in TINY.points.contexts}
    assert points == {*of_first, ("tiny-experts", 2, 80), ("tiny-gpt2", 2, 64 - 3)}
    for row in figures["decode"]:
        assert {"dtype", "step_ms", "bound_ms", "ratio", "in_graph"} <= row.keys()
        assert row["ratio"] == pytest.approx(row["bound_ms"] / row["step_ms"])
        assert row["wall_ms"] > 0
        assert row["fits"]
    prompts = {(row["model"], row["tokens"]): row["steps"] for row in figures["prefill"]}
    others = {("tiny-experts", 24): 1, ("tiny-gpt2", 24): 1}
    assert prompts == {("tiny", 24): 1, ("tiny", 300): 2} | others
    assert {row["model"]: row["graphs"] for row in figures["models"]} == dict.fromkeys(
        (TINY.model, *TINY.others), 0
    )


def check_engine(figures: dict[str, Any]) -> None:
    assert [(row["batch"], row["context"]) for row in figures["steady"]] == list(TINY.steady)
    for row in figures["steady"]:
        assert row["mean_context"] == pytest.approx(40, abs=2)
        assert row["ratio"] == pytest.approx(row["bound_ms"] / row["wall_ms"])
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["wall_ms"] * 1e3)
    first = figures["first_token"]
    assert (first["tokens"], first["found"]) == (96, 80)
    assert 0 < first["cached_host_ms"] < first["cached_ms"]
    assert 0 < first["cold_host_ms"] < first["cold_ms"]


def check_workloads(figures: dict[str, Any]) -> None:
    outcomes = {(row["by"], row["workload"]): row for row in figures["end_to_end"]}
    workloads = {w.name: w for w in (*TINY.offline, TINY.single, TINY.peer)}
    peers = {("generate", TINY.single.name), ("continuous", TINY.peer.name)}
    offline = {("engine", name) for name in workloads}
    assert outcomes.keys() == {*peers, *offline, ("http", TINY.http.name)}
    for (by, name), row in outcomes.items():
        assert row["finished"], (by, name)
        assert row["output_tokens"] == workloads[name].num_output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_run_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path)]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--only", "decode,lunch"], ["--models", "GPT-9"]])
def test_unknown_names_are_refused_with_the_known(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cpu", *flags])
    assert "is none of" in capsys.readouterr().err


def test_the_scales_can_run() -> None:
    """The scales fit the models and the budget of time."""
    for scale, limit_s in ((FULL, 9 * 60), (QUICK, 3 * 60)):
        assert scale.seconds < limit_s
        assert {scale.model, *scale.others} <= set(models.CONFIGS)
        for workload in (scale.http, scale.peer, scale.single):
            assert len(set(workload.lengths)) == 1
        for points in (scale.points, scale.other_points):
            assert all(batch <= max(points.batches) for batch, _, _ in points.prompts)
        assert {batch for batch, _ in scale.steady} <= set(scale.points.batches)


def test_what_the_sections_take_fits_the_full_scales_time(tmp_path: Path) -> None:
    run = Run(CPU, torch.float32, replace(FULL, kernels=TINY.kernels), tmp_path / "a.json")
    chosen = sections.sections_of(run, set(sections.SECTIONS))
    again = 15 * (FULL.starts - 1)
    assert sum(section.needs_s for section in chosen) + again <= FULL.seconds - 10
    assert len({section.name for section in chosen}) == len(chosen)


# -- a run that does not go well -----------------------------------------------------------


def test_what_fails_is_noted_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(sections, "measure_decode", fail)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--only", "decode,prefill"]
    assert main(arguments) == 1
    figures = result_of(tmp_path)
    error = "RuntimeError: illegal memory access"
    assert figures["errors"] == {f"tiny: decode at {context}": error for context in (20, 50)}
    assert figures["prefill"]
    assert figures["running"] is None


def test_a_model_that_cannot_be_loaded_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fail(name: str, *_: object) -> None:
        tried.append(name)
        raise RuntimeError("no such architecture")

    monkeypatch.setattr(models, "load", fail)
    run = tiny_run(tmp_path)
    run.measure(sections.sections_of(run, {"decode", "prefill"})[1:])
    assert tried == ["tiny"]
    assert len(run.figures["errors"]) == 3
    assert all("no such architecture" in error for error in run.figures["errors"].values())


def test_an_engine_in_which_something_failed_is_not_used_again(tmp_path: Path) -> None:
    stage = Stage(tiny_run(tmp_path))
    with pytest.raises(RuntimeError), stage.engine() as broken:
        raise RuntimeError("a step failed")
    with stage.engine() as engine:
        assert engine is not broken
    with stage.engine() as again:
        assert again is engine
    stage.clear()


def test_steps_without_a_graph_are_a_failure_where_there_are_graphs(tmp_path: Path) -> None:
    def refuse(work: Any) -> Any:
        del work
        raise RuntimeError("operation not permitted when stream is capturing")

    run = tiny_run(tmp_path, points=replace(TINY.points, batches=(1,)))
    stage = Stage(run)
    subject = stage.subject("tiny")
    stage._runner = Steps(subject.loaded, subject.limits, refuse)
    with pytest.raises(RuntimeError, match=r"no graph of its steps.*: 1"):
        sections.measure_decode(run, stage, "tiny", 20)
    assert run.figures["errors"] == {}
    assert [row["in_graph"] for row in run.figures["decode"]] == [False]
    stage.clear()


def test_a_kernel_that_fails_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = kernel_cases.measure

    def fail_norms(case: kernel_cases.KernelCase, *others: Any) -> dict[str, Any]:
        if case.name == "norm":
            raise RuntimeError("too few registers")
        return measured(case, *others)

    monkeypatch.setattr(kernel_cases, "measure", fail_norms)
    run = tiny_run(tmp_path, kernel_batches=(1,))
    every = sections.sections_of(run, {"kernels"})
    run.measure([section for section in every if section.name == "kernels: step"])
    assert list(run.figures["errors"]) == ["norm {'batch': 1}"]
    assert "add_norm" in {row["kernel"] for row in run.figures["kernels"]}


def test_what_the_time_does_not_reach_is_listed_with_the_reason(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, seconds=0.0)
    run.measure([Section("decode", lambda: None, needs_s=0.0)])
    assert run.figures["skipped"] == [
        {"section": "decode", "reason": "takes some 0 s, and 0 are left"}
    ]
    run = tiny_run(tmp_path, seconds=30.4)
    run.device = torch.device("cuda")
    assert not run.has_time("load", needs_s=40)
    assert run.has_time("kernels", needs_s=10)
    assert run.figures["skipped"] == [
        {"section": "load", "reason": "takes some 40 s, and 30 are left"}
    ]


def test_what_cannot_be_measured_here_is_no_failure(tmp_path: Path) -> None:
    def work() -> None:
        raise NothingToMeasure("no room")

    run = tiny_run(tmp_path)
    run.measure([Section("cold start", work, 0.0)])
    assert run.figures["skipped"] == [{"section": "cold start", "reason": "no room"}]
    assert run.figures["errors"] == {}


def test_figures_are_written_before_and_after_each_section(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    seen = []

    def first() -> None:
        seen.append(result_of(tmp_path)["running"]["section"])
        run.figures["decode"].append({"step_ms": 1.0})

    second = Section("second", lambda: seen.append(result_of(tmp_path)["decode"]), 0.0)
    run.measure([Section("first", first, 0.0), second])
    assert seen == ["first", [{"step_ms": 1.0}]]
    figures = result_of(tmp_path)
    assert set(figures["seconds"]) == {"first", "second"}
    assert figures["running"] is None


def test_a_run_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    run, done = tiny_run(tmp_path), []

    def section(name: str) -> Section:
        return Section(name, lambda: done.append(name), 0.0)

    run.figures["seconds"] = {"first": None}
    run.skip("second", "no time")
    run.measure([section("first"), section("second"), section("third")])
    assert done == ["third"]


def test_a_lost_device_ends_the_process_with_the_section_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    run = tiny_run(tmp_path)
    run.device = torch.device("cuda")
    with pytest.raises(DeviceLost):
        run.measure([Section("kernels", fail, 0.0), Section("never", fail, 0.0)])
    figures = result_of(tmp_path)
    assert figures["errors"] == {"kernels": "RuntimeError: illegal memory access"}
    assert list(figures["seconds"]) == ["kernels"]


# -- kernels and steps, as they are on a GPU -----------------------------------------------


@pytest.mark.parametrize("ops", [TORCH, TRITON], ids=["torch", "triton"])
def test_every_kernel_can_be_called_again_and_again(ops: Ops) -> None:
    setting = Setting(TINY.kernels, CPU, torch.float32, ops)
    cases = kernel_cases.cases(setting, (2,), (20,), ((2, 9, 0), (1, 5, 7)))
    cases["experts"] = expert_cases.cases(setting, TINY.experts, (2,))
    for case in (case for of_kind in cases.values() for case in of_kind):
        call = case.make()
        call()
        assert call() is not None, case.name
        assert case.num_bytes > 0


def test_a_kernels_row_is_what_it_moves_over_its_time() -> None:
    case = kernel_cases.KernelCase("nap", lambda: lambda: time.sleep(0.01), 2e6, 1e6, {"batch": 3})
    row = kernel_cases.measure(case, Timer(CPU), Rates(1e9, 1e9))
    assert row["batch"] == 3
    assert 10_000 <= row["us"] < 20_000
    assert row["gb_per_s"] == pytest.approx(2e6 / row["us"] / 1e3)
    assert row["ratio"] == pytest.approx(2e6 / 1e9 / (row["us"] / 1e6))


@pytest.mark.parametrize("batch", [1, 3])
def test_timed_decode_steps_replay_the_engines_graphs(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fused_sampling,
        "greedy",
        recorded_kernel(fused_sampling.greedy),
    )
    captured = []

    def remember(work: Any) -> Any:
        captured.append(capture(work))
        return captured[-1]

    loaded = prepared("llama", recorded(TRITON), num_hidden_layers=1)
    config = EngineConfig(max_sequences=4, max_batch_tokens=64, num_blocks=32)
    steps = Steps(loaded, decide_limits(loaded, config), remember)
    seconds = steps.decode(batch, 20, count=2)
    assert len(captured) == steps.num_graphs == 2, "the forward and the sampling, each once"
    assert seconds.in_graph
    assert steps.decode(batch, 24, count=2).in_graph, "a size is captured once"
    assert steps.num_graphs == 2
    assert seconds.fits
    assert min(seconds.on_device, seconds.wall) > 0
    steps.close()


def test_a_prompt_beside_decodes_is_timed_with_and_without_its_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused_sampling, "greedy", recorded_kernel(fused_sampling.greedy))
    loaded = prepared("llama", recorded(TRITON), num_hidden_layers=1)
    config = EngineConfig(max_sequences=2, max_batch_tokens=16, num_blocks=32)
    steps = Steps(loaded, decide_limits(loaded, config), capture)
    eager, replayed = steps.mixed(9, decodes=1, context=20, count=2)
    assert replayed is not None
    assert steps.num_graphs == 2, "the eager step was not captured"
    assert min(eager.on_device, replayed.on_device, eager.host, replayed.host) > 0
    captured = list(steps.capture_all())
    assert [(c.shape.tokens, c.shape.prefills) for c in captured] == [
        (2, False),
        (1, False),
        (16, True),
    ]
    assert all(c.seconds > 0 for c in captured)
    steps.close()


def test_sequences_share_blocks_only_where_the_cache_is_too_small() -> None:
    loaded = prepared("llama")
    config = EngineConfig(max_sequences=4, max_total_tokens=64, num_blocks=6)
    steps = Steps(loaded, decide_limits(loaded, config), None)
    assert steps.decode(2, 32, count=2).fits
    assert not steps.decode(3, 40, count=2).fits
    assert steps.prefill(2, 16, 16, count=1).fits
    steps.close()


# -- workloads -----------------------------------------------------------------------------


def test_the_mixed_workload_is_nano_vllms() -> None:
    """nano-vllm's own benchmark has these numbers of tokens."""
    workload = mixed(256, 1024)
    assert workload.num_output == 133_966
    assert len(workload.lengths) == 256
    assert all(100 <= length <= 1024 for pair in workload.lengths for length in pair)


def test_requests_are_as_long_as_the_workload_says() -> None:
    requests = Workload("w", ((3, 5), (7, 2))).requests(vocab_size=11)
    assert [(len(r.prompt_ids), r.stopping.max_new_tokens) for r in requests] == [(3, 5), (7, 2)]
    assert all(token < 11 for r in requests for token in r.prompt_ids)
    assert all(r.stopping.ignore_eos for r in requests)


def engine(**config: Any) -> Engine:
    return Engine(prepared("llama"), EngineConfig(max_batch_tokens=64, num_blocks=64, **config))


def test_a_workload_counts_every_token() -> None:
    workload = uniform(5, 9, 4)
    outcome = workloads.offline(engine(max_sequences=3), workload.requests(200))
    assert outcome.output_tokens == workload.num_output == 20
    assert outcome.finished
    assert outcome.figures()["tokens_per_s"] == pytest.approx(20 / outcome.seconds)


def test_a_workload_that_runs_out_of_time_tells_what_it_came_to() -> None:
    serving = engine(max_sequences=3)
    requests = uniform(3, 9, 200).requests(200)
    outcome = workloads.offline(serving, requests, deadline=time.perf_counter() + 0.05)
    assert 0 < outcome.output_tokens < 600
    assert not outcome.finished
    assert not serving.has_work


def test_warming_runs_steps_of_every_size_twice() -> None:
    serving = engine(max_sequences=11)
    sizes = []
    launch = serving.runner.launch

    def remember(step: Any) -> Any:
        sizes.append(step.num_sampled)
        return launch(step)

    serving.runner.launch = remember  # type: ignore[method-assign]
    warm(serving, SamplingParams(), 200)
    for size in (1, 2, 4, 8, 11):
        assert sizes.count(size) >= 2, size


def test_a_word_of_the_load_generator_is_a_token() -> None:
    plan = LoadPlan("tgi", 4, LengthMix.parse("300"), LengthMix.parse("1"), concurrency=1, seed=7)
    tokenizer = models.word_tokenizer(3000)
    for prompt in make_prompts(plan)[1]:
        assert len(tokenizer.encode(prompt.text)) == pytest.approx(prompt.num_words, abs=1)
    assert all(tokenizer.decode([token_id], False) for token_id in range(300, 3000))


# -- timing on CUDA, without it ------------------------------------------------------------


class FakeEvent:
    """Stands for a CUDA event, with the host's clock."""

    def __init__(self, **_: object):
        self._time_s = 0.0

    def record(self) -> None:
        self._time_s = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "FakeEvent") -> float:
        return (end._time_s - self._time_s) * 1e3


class FakeGraph:
    def __init__(self, work: Any):
        self.replay = work


class FakePending:
    def result(self) -> None:
        pass

    def exception(self) -> None:
        pass


@pytest.fixture
def cuda_timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: time.sleep(cycles / 2e9))
    monkeypatch.setattr(device, "CudaCapture", lambda: lambda work: (FakeGraph(work), None))
    return Timer(torch.device("cuda"))


def test_on_cuda_calls_are_captured_in_turn_and_replayed(cuda_timer: Timer) -> None:
    made = []

    def append_and_sleep() -> None:
        made.append("b")
        time.sleep(0.002)

    seconds = cuda_timer.of(lambda: made.append("a"), append_and_sleep, min_s=0.008)
    assert seconds >= 0.001  # of a call: every other one sleeps 2 ms
    assert made == ["a", "b"] * (len(made) // 2)


def test_on_cuda_steps_are_queued_while_the_device_sleeps(cuda_timer: Timer) -> None:
    def launch() -> FakePending:
        time.sleep(0.002)
        return FakePending()

    assert cuda_timer.launched(launch, 5) >= 0.002
