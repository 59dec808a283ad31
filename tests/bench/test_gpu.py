"""The GPU benchmark as a program: every section runs, here on the CPU; nothing is ever lost."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import device, gpu, gpu_kernels, gpu_models, gpu_workloads
from bench.bounds import Rates
from bench.device import Timer
from bench.gpu import TINY, Run, main, measure, new_run
from bench.gpu_kernels import Setting
from bench.gpu_steps import Steps
from bench.gpu_workloads import Workload, mixed, uniform, warm
from bench.workload import LengthMix, LoadPlan, make_prompts
from engine import fused_sampler
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import SamplingParams
from engine.sizing import decide_limits
from kernels.ops import TORCH, TRITON, Ops
from tests.engine.models import adopted
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
    return new_run(CPU, replace(TINY, **scale), folder)


# -- the whole program ---------------------------------------------------------------------


def test_every_section_runs_and_is_written(tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    figures = result_of(tmp_path)
    assert figures["errors"] == {}
    assert figures["skipped"] == []
    assert {"device", "versions", "ceilings", "kernels"} <= figures.keys()
    assert figures["ceilings"]["gb_per_s"] > 0
    assert len(figures["decode"]) == len(TINY.batches) * len(TINY.contexts)
    for row in figures["decode"]:
        assert {"model", "dtype", "batch", "context", "step_ms", "bound_ms", "ratio"} <= row.keys()
        assert row["ratio"] == pytest.approx(row["bound_ms"] / row["step_ms"])
        assert row["wall_ms"] > 0
        assert row["fits"]
    assert len(figures["prefill"]) == len(TINY.prompts)
    of_a_step = len(TINY.kernel_batches) * (7 + 5)  # kernels and GEMMs
    attention = len(TINY.kernel_batches) * len(TINY.kernel_contexts) + len(TINY.prompts)
    assert len(figures["kernels"]) == of_a_step + attention
    outcomes = {(row["by"], row["workload"]): row for row in figures["end_to_end"]}
    peers = {(by, TINY.peer.name) for by in ("engine", "generate", "continuous")}
    offline = {("engine", workload.name) for workload in TINY.offline}
    assert outcomes.keys() == {*peers, *offline, ("http", TINY.http.name)}
    for (by, name), row in outcomes.items():
        assert row["finished"], (by, name)
        workloads = (*TINY.offline, TINY.http, TINY.peer)
        expected = next(w.num_output for w in workloads if w.name == name)
        assert row["output_tokens"] == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
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
    """What a sequence is limited to, a step's tokens and the budget of time."""
    for scale, limit_s in ((gpu.FULL, 8 * 60), (gpu.QUICK, 2 * 60)):
        assert scale.seconds < limit_s
        assert set(scale.models) <= set(gpu_models.CONFIGS)
        assert max(batch * length for batch, length, _ in scale.prompts) <= 4096
        for workload in (scale.http, scale.peer):
            assert len(set(workload.lengths)) == 1, "all that its clients can ask for"
    assert gpu.FULL.batches == (1, 8, 32, 128, 256)
    assert gpu.FULL.contexts == (128, 1024, 8192)


# -- a run that does not go well -----------------------------------------------------------


def test_what_fails_is_noted_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(gpu, "measure_kernels", fail)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--only", "kernels,prefill"]
    assert main(arguments) == 1
    figures = result_of(tmp_path)
    assert figures["errors"] == {"kernels": "RuntimeError: illegal memory access"}
    assert figures["prefill"]


def test_a_kernel_that_fails_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = gpu_kernels.measure

    def fail_norms(case: gpu_kernels.KernelCase, *others: Any) -> dict[str, Any]:
        if case.name == "norm":
            raise RuntimeError("too few registers")
        return measured(case, *others)

    monkeypatch.setattr(gpu_kernels, "measure", fail_norms)
    run = tiny_run(tmp_path, kernel_batches=(1,))
    gpu.measure_kernels(run, Rates(1e9, 1e9))
    assert list(run.figures["errors"]) == ["norm {'batch': 1}"]
    assert "add_norm" in {row["kernel"] for row in run.figures["kernels"]}


def test_what_the_time_does_not_reach_is_listed_with_the_reason(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, seconds=0.0)
    measure(run, set(gpu.SECTIONS))
    assert run.figures["skipped"] == [
        {"section": "ceilings", "reason": "takes some 0 s, and 0 are left"}
    ]
    run = tiny_run(tmp_path, seconds=30.0)
    run.device = torch.device("cuda")
    assert not run.has_time("load", needs_s=40)
    assert run.has_time("kernels", needs_s=10)
    assert run.figures["skipped"] == [
        {"section": "load", "reason": "takes some 40 s, and 30 are left"}
    ]


def test_figures_are_written_after_each_section(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    seen = []

    def first() -> None:
        run.figures["decode"].append({"step_ms": 1.0})

    run.section("first", first)
    run.section("second", lambda: seen.append(result_of(tmp_path)["decode"]))
    assert seen == [[{"step_ms": 1.0}]]
    assert set(result_of(tmp_path)["seconds"]) == {"first", "second"}


def test_a_prompt_larger_than_a_step_is_skipped_with_the_reason(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, prompts=((1, 8, 0), (1, 257, 0)))
    subject = gpu.load(run, "tiny")
    gpu.measure_prefill(run, subject, Rates(1e9, 1e9))
    assert [row["tokens"] for row in run.figures["prefill"]] == [8]
    assert [s["reason"] for s in run.figures["skipped"]] == ["a step has 256 tokens at most"]


# -- kernels and steps, as they are on a GPU -----------------------------------------------


@pytest.mark.parametrize("ops", [TORCH, TRITON], ids=["torch", "triton"])
def test_every_kernel_can_be_called_again_and_again(ops: Ops) -> None:
    setting = Setting(TINY.kernels, CPU, torch.float32, ops)
    for case in gpu_kernels.cases(setting, (2,), (20,), ((2, 9, 0), (1, 5, 7))):
        call = case.make()
        call()
        assert call() is not None, case.name
        assert case.num_bytes > 0


def test_a_kernels_row_is_what_it_moves_over_its_time() -> None:
    case = gpu_kernels.KernelCase("nap", lambda: lambda: time.sleep(0.01), 2e6, 1e6, {"batch": 3})
    row = gpu_kernels.measure(case, Timer(CPU), Rates(1e9, 1e9))
    assert row["batch"] == 3
    assert 10_000 <= row["us"] < 20_000
    assert row["gb_per_s"] == pytest.approx(2e6 / row["us"] / 1e3)
    assert row["ratio"] == pytest.approx(2e6 / 1e9 / (row["us"] / 1e6))


@pytest.mark.parametrize("batch", [1, 3])
def test_timed_decode_steps_replay_the_engines_graphs(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fused_sampler.fused_sampling, "greedy", recorded_kernel(fused_sampler.fused_sampling.greedy)
    )
    captured = []

    def remember(work: Any) -> Any:
        captured.append(capture(work))
        return captured[-1]

    loaded = adopted("llama", recorded(TRITON), num_hidden_layers=1)
    config = EngineConfig(max_sequences=4, max_batch_tokens=64, num_blocks=32)
    steps = Steps(loaded, decide_limits(loaded, config), remember)
    seconds = steps.decode(batch, 20, count=2)
    assert len(captured) == 2, "the forward and the sampling, each once"
    assert seconds.fits
    assert min(seconds.on_device, seconds.wall) > 0
    steps.close()


def test_sequences_share_blocks_only_where_the_cache_is_too_small() -> None:
    loaded = adopted("llama")
    config = EngineConfig(max_sequences=4, max_total_tokens=64, num_blocks=6)
    steps = Steps(loaded, decide_limits(loaded, config), None)
    assert steps.decode(2, 32, count=2).fits
    assert not steps.decode(3, 40, count=2).fits
    assert steps.prefill(2, 16, 16, count=1).fits
    steps.close()


# -- workloads -----------------------------------------------------------------------------


def test_the_mixed_workload_is_nano_vllms() -> None:
    """As its own benchmark counts them."""
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
    return Engine(adopted("llama"), EngineConfig(max_batch_tokens=64, num_blocks=64, **config))


def test_a_workload_counts_every_token() -> None:
    workload = uniform(5, 9, 4)
    outcome = gpu_workloads.offline(engine(max_sequences=3), workload.requests(200))
    assert outcome.output_tokens == workload.num_output == 20
    assert outcome.finished
    assert outcome.figures()["tokens_per_s"] == pytest.approx(20 / outcome.seconds)


def test_a_workload_that_runs_out_of_time_tells_what_it_came_to() -> None:
    serving = engine(max_sequences=3)
    requests = uniform(3, 9, 200).requests(200)
    outcome = gpu_workloads.offline(serving, requests, deadline=time.perf_counter() + 0.05)
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
    tokenizer = gpu_models.word_tokenizer(3000)
    for prompt in make_prompts(plan)[1]:
        assert len(tokenizer.encode(prompt.text)) == pytest.approx(prompt.num_words, abs=1)
    assert all(tokenizer.decode([token_id], False) for token_id in range(300, 3000))


# -- timing on CUDA, without it ------------------------------------------------------------


class FakeEvent:
    """The clock, in place of the device's."""

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


@pytest.fixture
def cuda_timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: time.sleep(cycles / 2e9))
    monkeypatch.setattr(device, "CudaCapture", lambda: lambda work: (FakeGraph(work), None))
    return Timer(torch.device("cuda"))


def test_on_cuda_calls_are_captured_in_turn_and_replayed(cuda_timer: Timer) -> None:
    made = []
    calls = [lambda: made.append("a"), lambda: (made.append("b"), time.sleep(0.002))]
    seconds = cuda_timer.of(*calls, min_s=0.008)
    assert seconds == pytest.approx(0.001, rel=0.3)
    assert made == ["a", "b"] * (len(made) // 2)


def test_on_cuda_steps_are_queued_while_the_device_sleeps(cuda_timer: Timer) -> None:
    def launch() -> FakePending:
        time.sleep(0.002)
        return FakePending()

    assert cuda_timer.launched(launch, 5) == pytest.approx(0.002, rel=0.3)
