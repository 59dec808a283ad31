"""What the GPU path does beside what the GPU can do, and beside transformers.

Random weights of real shapes, on one device, in one run: the ceilings first, then each kernel
and each decode step as a share of them, prefill, and whole workloads against transformers on
the same card. A section that fails is noted and the others go on; what the time does not reach
is listed. The figures are written after every section.

    python -m bench.gpu                        all of it, within 8 minutes
    python -m bench.gpu --quick                one model and fewer points, within 2
    python -m bench.gpu --only decode,prefill  some sections
    python -m bench.gpu --table                rewrite the table in bench/README.md from the results
"""

import argparse
import datetime
import gc
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from bench import gpu_models
from bench.bounds import decode_bound_s, linear_weights, prefill_flops
from bench.device import Ceilings, Timer, measure_ceilings
from bench.gpu_kernels import KERNELS, KernelCase
from bench.http_engine import serving_engine
from bench.load import run_load
from bench.workload import LengthMix, LoadPlan
from engine.attention import ATTENTION_NAME
from engine.attention_plan import FixedTables, StepSequences
from engine.config import BLOCK_SIZE, EngineConfig
from engine.engine import Engine
from engine.graphs import CudaCapture
from engine.kv_cache import bind_kv_cache, bytes_per_block
from engine.loader import LoadedModel
from engine.probe import use_attention
from engine.request import Request, SamplingParams, StoppingParams

_RESULTS = Path(__file__).parent / "results"
_README = Path(__file__).parent / "README.md"
_MARKS = ("<!-- gpu table -->", "<!-- end of gpu table -->")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of it is measured."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompt_lens: tuple[int, ...]
    num_requests: int
    request_len: int
    mixed_requests: int
    longest_mixed: int
    seconds: float


FULL = Scale(
    models=("Llama-3.1-8B", "Qwen3-8B", "Gemma-2-9B"),
    batches=(1, 8, 32, 128, 256),
    contexts=(128, 1024, 8192),
    prompt_lens=(512, 4096, 16384),
    num_requests=256,
    request_len=1000,
    mixed_requests=256,
    longest_mixed=1024,
    seconds=460,
)
QUICK = Scale(
    models=("Llama-3.1-8B",),
    batches=(1, 32, 256),
    contexts=(1024,),
    prompt_lens=(4096,),
    num_requests=64,
    request_len=200,
    mixed_requests=64,
    longest_mixed=256,
    seconds=110,
)


@dataclass
class Run:
    """One run: where its figures go, and how long it may go on."""

    device: torch.device
    dtype: torch.dtype
    scale: Scale
    path: Path
    figures: dict[str, Any]
    started: float = field(default_factory=time.perf_counter)
    ceilings: Ceilings | None = None

    @property
    def seconds_left(self) -> float:
        return self.scale.seconds - (time.perf_counter() - self.started)

    def has_time(self, what: str, seconds: float = 0) -> bool:
        if self.seconds_left > seconds:
            return True
        self.figures["skipped"].append(f"{what}: {self.seconds_left:.0f} s were left")
        return False

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.figures, indent=1) + "\n")


@contextmanager
def section(run: Run, name: str) -> Iterator[None]:
    """Whatever happens in it, the other figures are kept."""
    started = time.perf_counter()
    print(f"{name} ...", end=" ", flush=True)
    try:
        yield
    except Exception as error:
        run.figures["errors"][name] = f"{type(error).__name__}: {error}"
        print(f"failed: {error}", flush=True)
    else:
        print(f"{time.perf_counter() - started:.1f} s", flush=True)
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    run.write()


# -- ceilings and kernels ------------------------------------------------------------------


def measure_kernels(run: Run) -> None:
    """Each kernel at Llama-3.1-8B's shapes: what it moves and computes a second."""
    assert run.ceilings is not None
    timer = Timer(run.device)
    for name, make in KERNELS.items():
        for rows in run.scale.batches:
            if not run.has_time(f"kernel {name} at {rows}"):
                return
            case: KernelCase = make(rows, run.device, run.dtype)
            seconds = timer.seconds(_captured(run, case.work), min_s=0.02)
            run.figures["kernels"].append(
                {
                    "kernel": name,
                    "rows": rows,
                    "us": seconds * 1e6,
                    "gb_per_s": case.num_bytes / seconds / 1e9,
                    "tflops": case.flops / seconds / 1e12,
                    "of_bound": run.ceilings.bound_s(case.num_bytes, case.flops) / seconds,
                }
            )


def _captured(run: Run, work: Callable[[], object]) -> Callable[[], object]:
    """As a graph replays it: what the host does to launch is not the kernel's time."""
    work()
    if run.device.type != "cuda":
        return work
    graph, _ = CudaCapture()(work)
    return graph.replay


# -- one model -----------------------------------------------------------------------------


class Driven:
    """A model over a cache whose blocks are dealt at random, driven without a scheduler."""

    def __init__(self, run: Run, loaded: LoadedModel):
        self.run, self.loaded = run, loaded
        self._blocks = self._num_blocks()
        use_attention(loaded.model, ATTENTION_NAME)
        self._context = bind_kv_cache(
            loaded.calls, self._blocks, loaded.model.dtype, run.device, loaded.ops
        )

    def _num_blocks(self) -> int:
        scale = self.run.scale
        wanted = max(scale.batches) * max(scale.contexts) // BLOCK_SIZE + 1
        if self.run.device.type != "cuda":
            return min(wanted, 256)
        free, _ = torch.cuda.mem_get_info(self.run.device)
        block_bytes = bytes_per_block(self.loaded.calls, self.loaded.model.dtype)
        return min(wanted, int(free * 0.6) // block_bytes)

    @torch.inference_mode()
    def step(self, sequences: StepSequences) -> Callable[[], Tensor]:
        """The forward of these sequences, and the best token of each."""
        width = -(-int(sequences.ends.max()) // BLOCK_SIZE)
        rng = np.random.default_rng(0)
        tables = rng.integers(self._blocks, size=(len(sequences.slots), width))
        calls, device = self.loaded.calls, self.run.device
        metadata = FixedTables(self.loaded.ops, calls, tables, device).metadata(sequences)
        positions = torch.from_numpy(sequences.positions)[None].to(device)
        ids = torch.zeros_like(positions)
        rows = torch.from_numpy(np.cumsum(sequences.lengths) - 1).to(device)

        @torch.inference_mode()
        def forward() -> Tensor:
            self._context.metadata = metadata
            logits = self.loaded.model(
                input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=rows
            ).logits[0]
            return logits.argmax(-1)

        return forward


def measure_decode(driven: Driven, name: str) -> None:
    run, loaded = driven.run, driven.loaded
    assert run.ceilings is not None
    timer, weights = Timer(run.device), linear_weights(loaded.model)
    for context in run.scale.contexts:
        for batch in run.scale.batches:
            if context > loaded.max_positions or not run.has_time(f"decode {name} {batch}"):
                continue
            sequences = StepSequences(
                np.arange(batch), np.full(batch, context - 1), np.ones(batch, dtype=np.int64)
            )
            seconds = timer.seconds(_captured(run, driven.step(sequences)), min_s=0.2)
            cache_bytes = loaded.model.dtype.itemsize
            bound = decode_bound_s(weights, loaded.calls, batch, context, cache_bytes, run.ceilings)
            run.figures["decode"].append(
                {
                    "model": name,
                    "dtype": str(loaded.model.dtype).removeprefix("torch."),
                    "batch": batch,
                    "context": context,
                    "step_ms": seconds * 1e3,
                    "bound_ms": bound * 1e3,
                    "ratio": bound / seconds,
                }
            )


def measure_prefill(driven: Driven, name: str) -> None:
    run, loaded = driven.run, driven.loaded
    assert run.ceilings is not None
    weights = linear_weights(loaded.model)
    for length in run.scale.prompt_lens:
        if length > loaded.max_positions or not run.has_time(f"prefill {name} {length}"):
            continue
        sequences = StepSequences(np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([length]))
        seconds = Timer(run.device).seconds(driven.step(sequences), min_s=0.1)
        flops = prefill_flops(weights, loaded.calls, length)
        run.figures["prefill"].append(
            {
                "model": name,
                "tokens": length,
                "ms": seconds * 1e3,
                "tflops": flops / seconds / 1e12,
                "of_ceiling": flops / seconds / run.ceilings.flops_per_s,
            }
        )


# -- whole workloads -----------------------------------------------------------------------


def uniform_requests(scale: Scale) -> list[Request]:
    lengths = [(scale.request_len, scale.request_len)] * scale.num_requests
    return [_request(i, *pair) for i, pair in enumerate(lengths)]


def mixed_requests(scale: Scale) -> list[Request]:
    """nano-vllm's: 100 to 1024 tokens in and out, seed 0."""
    rng, low = random.Random(0), min(100, scale.longest_mixed)
    lengths = [
        (rng.randint(low, scale.longest_mixed), rng.randint(low, scale.longest_mixed))
        for _ in range(scale.mixed_requests)
    ]
    return [_request(i, *pair) for i, pair in enumerate(lengths)]


def _request(index: int, num_in: int, num_out: int) -> Request:
    rng = random.Random(index)
    return Request(
        f"{index}-{num_in}-{num_out}",
        [rng.randrange(256) for _ in range(num_in)],
        SamplingParams(),
        StoppingParams(num_out, ignore_eos=True),
    )


def engine_for(run: Run, loaded: LoadedModel) -> Engine:
    scale = run.scale
    longest = max(2 * scale.request_len, 2 * scale.longest_mixed)
    small = {} if run.device.type == "cuda" else {"num_blocks": 512, "max_sequences": 8}
    engine = Engine(loaded, EngineConfig(max_total_tokens=longest, **small))  # type: ignore[arg-type]
    while engine.prepare():
        pass
    return engine


def offline_rate(engine: Engine, requests: list[Request]) -> float:
    """Output tokens a second, all requests there from the start."""
    for request in requests:
        engine.add(request)
    started = time.perf_counter()
    while engine.has_work:
        engine.step()
    engine.scheduler.pool.forget_cached()
    return sum(r.stopping.max_new_tokens for r in requests) / (time.perf_counter() - started)


def http_rate(engine: Engine, scale: Scale) -> float:
    """The same over HTTP: every request a stream of its own, all at once."""
    import uvloop

    plan = LoadPlan(
        api="tgi",
        num_requests=scale.num_requests,
        concurrency=scale.num_requests,
        input_len=LengthMix.parse(str(scale.request_len)),
        output_len=LengthMix.parse(str(scale.request_len)),
        seed=0,
    )
    with serving_engine(engine) as url:
        summary = uvloop.run(run_load(url, plan)).summary
    return float(summary.total_output_tokens / summary.duration_s)


def transformers_rates(run: Run, name: str) -> dict[str, float]:
    """`generate` on one batch and `generate_batch`, on a model as transformers has it."""
    model: Any = gpu_models.build(name, run.device, run.dtype)
    num, length = min(32, run.scale.num_requests), min(128, run.scale.request_len)
    ids = torch.randint(256, (num, length), device=run.device)
    rates = {}
    generate = partial(
        model.generate,
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=length,
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=0,
    )
    with torch.inference_mode():
        generate()
        rates["generate"] = num * length / _elapsed(run, generate)
    options = transformers.GenerationConfig(
        max_new_tokens=length, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    batch = partial(model.generate_batch, ids.tolist(), generation_config=options)
    rates["continuous"] = num * length / _elapsed(run, batch)
    return rates


def _elapsed(run: Run, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_end_to_end(run: Run, loaded: LoadedModel, name: str) -> None:
    figures = run.figures["end_to_end"]
    engine = engine_for(run, loaded)
    scale = run.scale
    workloads = {
        f"{scale.num_requests} of {scale.request_len} in and out": uniform_requests(scale),
        f"{scale.mixed_requests} of up to {scale.longest_mixed} in and out": mixed_requests(scale),
        "32 of 128 in and out": [
            _request(i, min(128, scale.request_len), min(128, scale.request_len))
            for i in range(min(32, scale.num_requests))
        ],
    }
    for workload, requests in workloads.items():
        if run.has_time(f"offline {workload}", seconds=20 if run.device.type == "cuda" else 0):
            figures.append(
                {"model": name, "workload": workload, "skiff": offline_rate(engine, requests)}
            )
            run.write()
    if run.has_time("over HTTP", seconds=30 if run.device.type == "cuda" else 0):
        figures.append({"model": name, "workload": "HTTP", "skiff": http_rate(engine, scale)})
    engine.close()


# -- the run -------------------------------------------------------------------------------

SECTIONS = ("kernels", "decode", "prefill", "end_to_end", "peers")


def measure(run: Run, only: set[str]) -> None:
    with section(run, "ceilings"):
        run.ceilings = measure_ceilings(run.device, run.dtype)
        run.figures["ceilings"] = asdict(run.ceilings)
    if run.ceilings is None:
        return
    if "kernels" in only:
        with section(run, "kernels"):
            measure_kernels(run)
    first = run.scale.models[0]
    for name in run.scale.models:
        if not only & {"decode", "prefill", "end_to_end"} or not run.has_time(name, seconds=15):
            continue
        loaded: LoadedModel | None = None
        with section(run, f"{name}: load"):
            loaded = gpu_models.load(name, run.device, run.dtype)
        if loaded is None:
            continue
        if only & {"decode", "prefill"}:
            with section(run, f"{name}: decode and prefill"):
                driven = Driven(run, loaded)
                if "decode" in only:
                    measure_decode(driven, name)
                if "prefill" in only:
                    measure_prefill(driven, name)
                del driven
        if "end_to_end" in only and name == first:
            with section(run, f"{name}: end to end"):
                measure_end_to_end(run, loaded, name)
        for call in loaded.calls:  # its cache goes with it
            call.module.paged_attention = None  # type: ignore[assignment]
        del loaded
        gc.collect()
    if "peers" in only and run.has_time("transformers", seconds=40 * (run.device.type == "cuda")):
        with section(run, f"{first}: transformers"):
            rates = transformers_rates(run, first)
            run.figures["end_to_end"].append(
                {"model": first, "workload": "32 of 128 in and out", **rates}
            )


def new_figures(device: torch.device) -> dict[str, Any]:
    import triton

    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        },
        "ceilings": None,
        "kernels": [],
        "decode": [],
        "prefill": [],
        "end_to_end": [],
        "skipped": [],
        "errors": {},
    }


def table(results: list[dict[str, Any]]) -> str:
    """The decode steps of every result, as Markdown."""
    lines = [
        "| device | model | batch | context | step ms | bound ms | of bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in result["decode"]:
            cells = (
                result["device"],
                row["model"],
                row["batch"],
                row["context"],
                f"{row['step_ms']:.2f}",
                f"{row['bound_ms']:.2f}",
                f"{row['ratio']:.0%}",
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    if len(lines) == 2:
        return "No GPU has been measured yet."
    return "\n".join(lines)


def rewrite_table(readme: Path, results: Path) -> None:
    """Between the marks in the README, from all results that have decode steps."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    body = table([result for result in found if result.get("decode")])
    before, _, rest = readme.read_text().partition(_MARKS[0])
    _, _, after = rest.partition(_MARKS[1])
    readme.write_text(f"{before}{_MARKS[0]}\n{body}\n{_MARKS[1]}{after}")


def _parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one model, fewer points, 2 minutes")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--models", help=f"of {', '.join(gpu_models.CONFIGS)}")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder for the figures")
    parser.add_argument("--table", action="store_true", help="only rewrite the table")
    return parser.parse_args(arguments)


def main(
    arguments: list[str] | None = None, device: str = "cuda", scale: Scale | None = None
) -> None:
    options = _parse_options(arguments)
    if options.table:
        rewrite_table(_README, options.out)
        return
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench.gpu: there is no CUDA device (bench.server measures on a CPU)")
    scale = scale or (QUICK if options.quick else FULL)
    if options.models:
        scale = Scale(**(asdict(scale) | {"models": tuple(options.models.split(","))}))
    figures = new_figures(torch.device(device))
    slug = re.sub(r"[^a-z0-9]+", "-", figures["device"].lower()).strip("-")
    path = options.out / f"{datetime.date.today().isoformat()}-{slug}.json"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    run = Run(torch.device(device), dtype, scale, path, figures)
    measure(run, set(options.only.split(",")))
    ratios = [row["ratio"] for row in figures["decode"]]
    if ratios:
        print(f"decode: {statistics.median(ratios):.0%} of the bound, the median of {len(ratios)}")
    print(f"figures in {path}")


if __name__ == "__main__":
    main()
