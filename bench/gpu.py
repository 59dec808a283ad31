"""What the GPU path does beside what the GPU can do, and beside transformers.

    python -m bench.gpu                         all of it, within 8 minutes
    python -m bench.gpu --quick                 one model and fewer points, within 2
    python -m bench.gpu --only decode,prefill   some sections
    python -m bench.gpu --device cpu            tiny shapes, to try the run itself
    python -m bench.gpu --table                 the tables in bench/README.md, from the results

Models of real shapes with random weights, on one device, in one run:

    ceilings  bandwidth of memory, rate of matrix products, cost of a launch (always measured)
    kernels   each alone, at Llama-3.1-8B's shapes
    decode    steps as the engine runs them, beside their bound: of each operation the longer
              of reading its weights, keys and values and of its arithmetic, at the ceilings
    prefill   likewise, of prompts
    offline   whole workloads, the engine driven by hand
    http      one of them over HTTP, by a client in another process
    peers     transformers' `generate` and its continuous batching, on one that is offline too

The last three are of the first model alone. What fails is noted, what the time does not reach
is listed with the reason, and all else goes on. The figures are written after every section, to
a new file: results/<date>-<device>.json.
"""

import argparse
import datetime
import gc
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
import triton

from bench import gpu_kernels, gpu_models, gpu_workloads
from bench.bounds import ModelCost, Rates, Work, decode_work, ideal_seconds, prefill_work
from bench.device import Timer, measure_ceilings
from bench.gpu_kernels import LLAMA_8B, KernelShape, Setting
from bench.gpu_report import result_path, rewrite_table
from bench.gpu_steps import Steps, StepSeconds
from bench.gpu_workloads import Outcome, Workload, mixed, uniform
from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import CudaCapture
from engine.loader import LoadedModel
from engine.sizing import Limits, decide_limits
from kernels.ops import ops_for

T = TypeVar("T")

SECTIONS = ("kernels", "decode", "prefill", "offline", "http", "peers")
_HERE = Path(__file__).parent
_MARGIN_S = 10.0
"""Left at the end by what stops at the deadline by itself."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured, and in what time.

    prompts   prefill steps: (prompts, tokens of each, tokens before them)
    count     steps that are timed of each kind
    peer      the workload that transformers gets too
    """

    name: str
    seconds: float
    models: tuple[str, ...]
    copy_bytes: int
    gemm_size: int
    kernels: KernelShape
    kernel_batches: tuple[int, ...]
    kernel_contexts: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[tuple[int, int, int], ...]
    count: int
    offline: tuple[Workload, ...]
    http: Workload
    peer: Workload

    @property
    def longest(self) -> int:
        """Tokens of any sequence, those of timed steps included; a prompt's text may be one more
        than was asked for.
        """
        steps = [*self.contexts, *(length + before for _, length, before in self.prompts)]
        workloads = [w.longest for w in (*self.offline, self.http, self.peer)]
        return max(*steps, *workloads) + self.count + 16


FULL = Scale(
    name="full",
    seconds=465,
    models=("Llama-3.1-8B", "Qwen3-8B", "Gemma-2-9B"),
    copy_bytes=4 << 30,
    gemm_size=8192,
    kernels=LLAMA_8B,
    kernel_batches=(1, 32, 256),
    kernel_contexts=(1024, 8192),
    batches=(1, 8, 32, 128, 256),
    contexts=(128, 1024, 8192),
    prompts=((1, 512, 0), (8, 512, 0), (1, 4096, 0), (1, 4096, 4096)),
    count=12,
    offline=(uniform(256, 1000, 1000), mixed(256, 1024)),
    http=uniform(256, 1000, 1000),
    peer=uniform(64, 1000, 128),
)
QUICK = replace(
    FULL,
    name="quick",
    seconds=110,
    models=FULL.models[:1],
    kernel_contexts=(1024,),
    contexts=(1024,),
    prompts=((1, 4096, 0),),
    count=6,
    offline=(mixed(64, 256),),
    http=uniform(64, 200, 200),
    peer=uniform(64, 200, 64),
)
TINY = Scale(
    name="tiny",
    seconds=600,
    models=("tiny",),
    copy_bytes=1 << 20,
    gemm_size=64,
    kernels=KernelShape(64, 128, 4, 2, 16, 512),
    kernel_batches=(1, 3),
    kernel_contexts=(40,),
    batches=(1, 3),
    contexts=(20, 50),
    prompts=((2, 24, 0), (1, 16, 20)),
    count=2,
    offline=(mixed(4, 24),),
    http=uniform(4, 12, 6),
    peer=uniform(3, 12, 4),
)


# -- a run ---------------------------------------------------------------------------------


@dataclass
class Run:
    """One run: its figures, where they are written, and how long it may go on."""

    device: torch.device
    dtype: torch.dtype
    scale: Scale
    path: Path
    figures: dict[str, Any]
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds_left(self) -> float:
        return self.scale.seconds - (time.perf_counter() - self.started)

    @property
    def deadline(self) -> float:
        """For what can stop by itself; `time.perf_counter`'s."""
        return self.started + self.scale.seconds - _MARGIN_S

    def has_time(self, name: str, needs_s: float = 0.0) -> bool:
        """Whether there is; else it is listed. A CPU is only for trying: it takes its time."""
        needs_s = needs_s if self.device.type == "cuda" else 0.0
        if self.seconds_left > needs_s:
            return True
        reason = f"takes some {needs_s:.0f} s, and {max(self.seconds_left, 0):.0f} are left"
        self.skip(name, reason)
        return False

    def skip(self, name: str, reason: str) -> None:
        self.figures["skipped"].append({"section": name, "reason": reason})

    def fail(self, name: str, error: Exception) -> None:
        self.figures["errors"][name] = f"{type(error).__name__}: {error}"[:500]

    def section(self, name: str, work: Callable[[], T], needs_s: float = 0.0) -> T | None:
        """Its result; None where there is no time for it, or it fails."""
        if not self.has_time(name, needs_s):
            return None
        print(f"[{self.scale.seconds - self.seconds_left:5.0f} s] {name} ", end="", flush=True)
        started, result = time.perf_counter(), None
        try:
            result = work()
        except Exception as error:
            self.fail(name, error)
            print("FAILED", self.figures["errors"][name], flush=True)
        seconds = time.perf_counter() - started
        self.figures["seconds"][name] = round(seconds, 2)
        print(f"{seconds:.1f} s", flush=True)
        self.write()
        self.release()
        return result

    def release(self) -> None:
        """Give back what is not used any more; a device that is dead has said so already."""
        gc.collect()
        if self.device.type == "cuda":
            with suppress(RuntimeError):
                torch.cuda.empty_cache()

    def write(self) -> None:
        """Whole or not at all: a run may be killed at any moment."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.figures, indent=1) + "\n")
        unfinished.replace(self.path)


def new_figures(device: torch.device, scale: Scale) -> dict[str, Any]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": versions,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "scale": scale.name,
        "ceilings": None,
        "models": [],
        "kernels": [],
        "decode": [],
        "prefill": [],
        "end_to_end": [],
        "skipped": [],
        "errors": {},
        "seconds": {},
        "log": [],
    }


@contextmanager
def logged(figures: dict[str, Any]) -> Iterator[None]:
    """What the engine logs goes with the figures: which fusions it found, what it could not do."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            figures["log"].append(f"{record.levelname} {record.getMessage()}")

    logger, handler = logging.getLogger("engine"), Keep()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def measure(run: Run, only: set[str]) -> None:
    """Every section asked for, the most telling first."""
    rates = run.section("ceilings", partial(measure_device, run))
    if rates is None:
        return
    if "kernels" in only:
        run.section("kernels", partial(measure_kernels, run, rates), needs_s=10)
    first, *others = run.scale.models
    if only - {"kernels", "peers"}:
        measure_model(run, first, rates, only)
    if "peers" in only:
        measure_peers(run, first)
    for name in others:
        if only & {"decode", "prefill"}:
            measure_model(run, name, rates, only & {"decode", "prefill"})


def measure_device(run: Run) -> Rates:
    scale = run.scale
    ceilings = measure_ceilings(run.device, run.dtype, scale.copy_bytes, scale.gemm_size)
    run.figures["ceilings"] = ceilings.figures()
    return ceilings.rates


def measure_kernels(run: Run, rates: Rates) -> None:
    scale, timer = run.scale, Timer(run.device)
    setting = Setting(scale.kernels, run.device, run.dtype, ops_for(run.device))
    sizes = scale.kernel_batches, scale.kernel_contexts, scale.prompts
    for case in gpu_kernels.cases(setting, *sizes):
        name = f"{case.name} {case.size}"
        if run.has_time(name, needs_s=5):
            try:
                run.figures["kernels"].append(gpu_kernels.measure(case, timer, rates))
            except Exception as error:
                run.fail(name, error)
            if timer.on_cuda:
                torch.cuda.empty_cache()


# -- one model -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, ready for the engine, and what its steps cost."""

    name: str
    loaded: LoadedModel
    limits: Limits
    cost: ModelCost

    @property
    def labels(self) -> dict[str, str]:
        return {"model": self.name, "dtype": self.loaded.info.dtype}


def measure_model(run: Run, name: str, rates: Rates, only: set[str]) -> None:
    subject = run.section(f"{name}: load", partial(load, run, name), needs_s=40)
    if subject is None:
        return
    if "decode" in only:
        run.section(f"{name}: decode", partial(measure_decode, run, subject, rates), needs_s=15)
    if "prefill" in only:
        run.section(f"{name}: prefill", partial(measure_prefill, run, subject, rates), needs_s=10)
    if only & {"offline", "http"}:
        measure_workloads(run, subject, rates, only)
    for call in subject.loaded.calls:
        call.module.paged_attention = None  # type: ignore[assignment]
    del subject
    run.release()


def load(run: Run, name: str) -> Subject:
    started = time.perf_counter()
    loaded = gpu_models.load(name, run.device, run.dtype)
    load_s = time.perf_counter() - started
    scale = run.scale
    config = EngineConfig(max_sequences=max(scale.batches), max_total_tokens=scale.longest)
    limits = decide_limits(loaded, config)
    cost = ModelCost.of(loaded, limits.cache_dtype.itemsize)
    run.figures["models"].append(
        {
            "model": name,
            "load_s": load_s,
            "size_s": time.perf_counter() - started - load_s,
            "weight_gb_per_step": cost.weight_bytes / 1e9,
            "limits": limits.reasons,
        }
    )
    return Subject(name, loaded, limits, cost)


@contextmanager
def steps_of(subject: Subject) -> Iterator[Steps]:
    on_cuda = subject.loaded.model.device.type == "cuda"
    steps = Steps(subject.loaded, subject.limits, CudaCapture() if on_cuda else None)
    try:
        yield steps
    finally:
        steps.close()


def measure_decode(run: Run, subject: Subject, rates: Rates) -> None:
    scale = run.scale
    with steps_of(subject) as steps:
        for context in scale.contexts:
            for batch in scale.batches:
                name = f"{subject.name}: decode {batch} x {context}"
                if run.has_time(name, needs_s=5):
                    seconds = steps.decode(batch, context, scale.count)
                    work = decode_work(subject.cost, batch, context, rates)
                    size = {"batch": batch, "context": context}
                    row = subject.labels | size | _figures(seconds, work)
                    row["tokens_per_s"] = batch / seconds.wall
                    run.figures["decode"].append(row)


def measure_prefill(run: Run, subject: Subject, rates: Rates) -> None:
    scale = run.scale
    with steps_of(subject) as steps:
        for batch, length, before in scale.prompts:
            name = f"{subject.name}: prefill {batch} x {length} after {before}"
            if batch * length > subject.limits.max_batch_tokens:
                run.skip(name, f"a step has {subject.limits.max_batch_tokens} tokens at most")
            elif run.has_time(name, needs_s=5):
                seconds = steps.prefill(batch, length, before, scale.count // 2)
                work = prefill_work(subject.cost, batch, length, before, rates)
                size = {"batch": batch, "tokens": length, "before": before}
                row = subject.labels | size | _figures(seconds, work)
                row["tokens_per_s"] = batch * length / seconds.wall
                run.figures["prefill"].append(row)


def _figures(seconds: StepSeconds, work: Work) -> dict[str, Any]:
    return {
        "step_ms": seconds.on_device * 1e3,
        "wall_ms": seconds.wall * 1e3,
        "bound_ms": work.seconds * 1e3,
        "ratio": work.seconds / seconds.on_device,
        "gb_per_s": work.num_bytes / seconds.on_device / 1e9,
        "tflops": work.flops / seconds.on_device / 1e12,
        "fits": seconds.fits,
    }


# -- whole workloads -----------------------------------------------------------------------


def measure_workloads(run: Run, subject: Subject, rates: Rates, only: set[str]) -> None:
    """One engine for all of them; the server comes last, since it closes it."""
    scale = run.scale
    engine = run.section(f"{subject.name}: engine", partial(warm_engine, run, subject), needs_s=15)
    if engine is None:
        return
    offline = dict.fromkeys((scale.peer, *scale.offline)) if "offline" in only else ()
    for workload in offline:
        ideal_s = ideal_seconds(subject.cost, workload.lengths, rates)
        name = f"{subject.name}: offline, {workload.name}"
        work = partial(measure_offline, run, subject, engine, workload, ideal_s)
        run.section(name, work, needs_s=2 * ideal_s + 3 + _MARGIN_S)
    if "http" in only:
        ideal_s = ideal_seconds(subject.cost, scale.http.lengths, rates)
        name = f"{subject.name}: over HTTP, {scale.http.name}"
        work = partial(measure_http, run, subject, engine, ideal_s)
        run.section(name, work, needs_s=2 * ideal_s + 8 + _MARGIN_S)
    engine.close()


def warm_engine(run: Run, subject: Subject) -> Engine:
    limits, loaded = subject.limits, subject.loaded
    config = EngineConfig(limits.max_sequences, max_total_tokens=limits.max_total_tokens)
    engine = Engine(loaded, config, limits)
    engine.warm_up()
    vocab_size = loaded.model.config.vocab_size
    for sampling in {w.sampling for w in (*run.scale.offline, run.scale.peer)}:
        gpu_workloads.warm(engine, sampling, vocab_size)
    return engine


def measure_offline(
    run: Run, subject: Subject, engine: Engine, workload: Workload, ideal_s: float
) -> None:
    requests = workload.requests(subject.loaded.model.config.vocab_size)
    before = engine.figures()
    outcome = gpu_workloads.offline(engine, requests, run.deadline)
    after = engine.figures()
    row = _end_to_end(subject.labels, workload, "engine", outcome.figures())
    row |= _beside_ideal(row, workload, ideal_s)
    row["steps"] = after.num_steps - before.num_steps
    row["preemptions"] = after.num_preemptions - before.num_preemptions
    run.figures["end_to_end"].append(row)


def measure_http(run: Run, subject: Subject, engine: Engine, ideal_s: float) -> None:
    workload = run.scale.http
    figures = gpu_workloads.over_http(engine, workload, run.deadline)
    row = _end_to_end(subject.labels, workload, "http", figures)
    run.figures["end_to_end"].append(row | _beside_ideal(row, workload, ideal_s))


def measure_peers(run: Run, name: str) -> None:
    """On a model of transformers' own, in which nothing is replaced."""
    peer, scale = f"{name}: transformers", run.scale
    build = partial(gpu_models.build, name, run.device, run.dtype)
    model = run.section(f"{peer}, load", build, needs_s=30)
    if model is None:
        return
    labels = {"model": name, "dtype": str(run.dtype).removeprefix("torch.")}
    share = None if run.device.type == "cuda" else 0.1
    by_name: dict[str, Callable[..., Outcome]] = {
        "generate": gpu_workloads.generate,
        "continuous": partial(gpu_workloads.continuous, memory_share=share),
    }
    for by, run_workload in by_name.items():

        def work(by: str = by, run_workload: Callable[..., Outcome] = run_workload) -> None:
            outcome = run_workload(model, scale.peer, run.deadline)
            row = _end_to_end(labels, scale.peer, by, outcome.figures())
            run.figures["end_to_end"].append(row)

        run.section(f"{peer}, {by}", work, needs_s=15 + _MARGIN_S)


def _end_to_end(
    labels: dict[str, str], workload: Workload, by: str, outcome: dict[str, Any]
) -> dict[str, Any]:
    return labels | {"workload": workload.name, "by": by} | outcome


def _beside_ideal(row: dict[str, Any], workload: Workload, ideal_s: float) -> dict[str, float]:
    ideal = workload.num_output / ideal_s
    return {"ideal_tokens_per_s": ideal, "ratio": row["tokens_per_s"] / ideal}


# -- the command line ----------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where nothing failed; what the time did not reach is no failure."""
    parser = _parser()
    options = parser.parse_args(arguments)
    only = _names(parser, "--only", options.only, SECTIONS)
    if options.table:
        rewrite_table(_HERE / "README.md", options.out)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: there is no CUDA device; --device cpu tries the run", file=sys.stderr)
        return 1
    scale = TINY if options.device == "cpu" else QUICK if options.quick else FULL
    if options.models:
        models = _names(parser, "--models", options.models, tuple(gpu_models.CONFIGS))
        scale = replace(scale, models=models)
    run = new_run(torch.device(options.device), scale, options.out)
    with logged(run.figures):
        measure(run, set(only))
    run.write()
    print(_last_words(run))
    return 1 if run.figures["errors"] else 0


def new_run(device: torch.device, scale: Scale, folder: Path) -> Run:
    figures = new_figures(device, scale)
    date = datetime.date.today().isoformat()
    path = result_path(folder, date, figures["device"], scale.name)
    return Run(device, _dtype(device), scale, path, figures)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _last_words(run: Run) -> str:
    figures = run.figures
    lines = [f"figures in {run.path}"]
    if figures["decode"]:
        ratio = statistics.median(row["ratio"] for row in figures["decode"])
        lines.append(f"decode steps: {ratio:.0%} of their bounds, in the median")
    lines += [f"not measured: {s['section']}: {s['reason']}" for s in figures["skipped"]]
    lines += [f"failed: {name}: {error}" for name, error in figures["errors"].items()]
    return "\n".join(lines)


def _names(
    parser: argparse.ArgumentParser, flag: str, text: str, known: tuple[str, ...]
) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            parser.error(f"{flag}: {name!r} is none of {', '.join(known)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one model, fewer points, within 2 minutes")
    add("--only", default=",".join(SECTIONS), metavar="SECTION,...", help="these and no other")
    add("--models", metavar="MODEL,...", help=f"of {', '.join(gpu_models.CONFIGS)}")
    add("--out", type=Path, default=_HERE / "results", help="folder of the results")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, for a try")
    add("--table", action="store_true", help="only make the tables from the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
