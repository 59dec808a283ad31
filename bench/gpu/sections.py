"""The sections of `bench.gpu`. Each one adds rows to the figures of its run."""

from collections.abc import Callable
from functools import partial
from typing import Any

from bench.gpu import (
    cold_start,
    engine_steps,
    expert_cases,
    kernel_cases,
    workloads,
)
from bench.gpu.bounds import (
    Rates,
    Work,
    decode_work,
    ideal_seconds,
    prefill_work,
)
from bench.gpu.device import Timer, measure_ceilings
from bench.gpu.kernel_cases import KernelCase, Setting
from bench.gpu.run import NothingToMeasure, Run, Section
from bench.gpu.stage import Stage, Subject
from bench.gpu.steps import Steps, StepSeconds
from bench.gpu.workloads import Outcome, Workload
from kernels.ops import ops_for

Row = dict[str, Any]

SECTIONS = (
    "decode",
    "prefill",
    "mixed",
    "graphs",
    "steady",
    "first-token",
    "offline",
    "http",
    "kernels",
    "peers",
    "models",
    "cold-start",
)


def sections_of(run: Run, only: set[str]) -> list[Section]:
    """Return the chosen sections, the most informative first.

    Their times are estimates for an H200 that has to compile the kernels: 473 s in all, of the
    493 s of the full scale.
    """
    stage, scale = Stage(run), run.scale
    first = scale.model
    by_name: dict[str, list[Section]] = {
        "decode": decode_sections(run, stage, first, first_s=35, next_s=8),
        "prefill": [Section(f"{first}: prefill", partial(measure_prefill, run, stage, first), 8)],
        "mixed": mixed_sections(run, stage),
        "graphs": graph_sections(run, stage),
        "steady": steady_sections(run, stage),
        "first-token": [Section("first token", partial(measure_first_token, run, stage), 5)],
        "offline": offline_sections(run, stage),
        "http": [http_section(run, stage)],
        "kernels": kernel_sections(run, stage),
        "peers": peer_sections(run, stage),
        "models": [s for name in scale.others for s in other_sections(run, stage, name)],
        "cold-start": [Section("cold start", partial(measure_cold_start, run, stage), 45)],
    }
    ceilings = Section("ceilings", partial(measure_device, run), 8)
    return [ceilings, *(section for name in SECTIONS if name in only for section in by_name[name])]


def rates_of(run: Run) -> Rates:
    """Return the rates of the ceilings. Raises NothingToMeasure if they are missing."""
    ceilings = run.figures["ceilings"]
    if ceilings is None:
        raise NothingToMeasure("there are no ceilings to compare with")
    return Rates(ceilings["gb_per_s"] * 1e9, ceilings["tflops"] * 1e12)


def measure_device(run: Run) -> None:
    scale = run.scale
    ceilings = measure_ceilings(run.device, run.dtype, scale.copy_bytes, scale.gemm_size)
    run.figures["ceilings"] = ceilings.figures()


# -- steps ---------------------------------------------------------------------------------


def decode_sections(
    run: Run, stage: Stage, name: str, first_s: float, next_s: float
) -> list[Section]:
    """Return a section for each context; the first one also loads the model."""
    is_first = name == run.scale.model
    contexts = (run.scale.points if is_first else run.scale.other_points).contexts
    return [
        Section(
            f"{name}: decode at {context}",
            partial(measure_decode, run, stage, name, context),
            next_s if index else first_s,
        )
        for index, context in enumerate(contexts)
    ]


def other_sections(run: Run, stage: Stage, name: str) -> list[Section]:
    """Return the sections of one of the other models.

    An 8B model takes 4 s to build, 10 s to probe and fuse (with kernels of its head size to
    compile), and 2 s to size. The graphs and steps of a batch take 2 s.
    """
    prefill = Section(f"{name}: prefill", partial(measure_prefill, run, stage, name), 3)
    return [*decode_sections(run, stage, name, first_s=20, next_s=5), prefill]


def measure_decode(run: Run, stage: Stage, name: str, context: int) -> None:
    rates, steps = rates_of(run), stage.steps(name)
    subject, count = stage.subject(name), run.scale.count
    context = min(context, subject.limits.max_total_tokens - count - 1)
    for batch in subject.points.batches:
        point = f"{name}: decode {batch} x {context}"
        if not run.has_time(point, needs_s=3):
            continue
        try:
            run.figures["decode"].append(_decode_row(subject, steps, batch, context, count, rates))
        except Exception as error:
            run.fail(point, error)
    for row in run.figures["models"]:
        if row["model"] == name:
            row["graphs"] = steps.num_graphs
    without = [r for r in run.figures["decode"] if r["model"] == name and not r["in_graph"]]
    if steps.captures and without:
        batches = ", ".join(str(row["batch"]) for row in without)
        raise RuntimeError(f"no graph of its steps, which were launched one by one: {batches}")


def _decode_row(
    subject: Subject, steps: Steps, batch: int, context: int, count: int, rates: Rates
) -> Row:
    seconds = steps.decode(batch, context, count)
    work = decode_work(subject.cost, batch, context, rates)
    row = subject.labels | {"batch": batch, "context": context} | _figures(seconds, work)
    return row | {"tokens_per_s": batch / seconds.wall, "in_graph": seconds.in_graph}


def measure_prefill(run: Run, stage: Stage, name: str) -> None:
    rates, steps, subject = rates_of(run), stage.steps(name), stage.subject(name)
    for batch, length, before in subject.points.prompts:
        point = f"{name}: prefill {batch} x {length} after {before}"
        if not run.has_time(point, needs_s=3):
            continue
        try:
            row = _prefill_row(subject, steps, (batch, length, before), run.scale.count, rates)
            run.figures["prefill"].append(row)
        except Exception as error:
            run.fail(point, error)


def _prefill_row(
    subject: Subject, steps: Steps, prompts: tuple[int, int, int], count: int, rates: Rates
) -> Row:
    """Measure a prefill in as many steps as the engine would take."""
    batch, length, before = prompts
    longest = subject.limits.max_batch_tokens // batch
    end, parts = before + length, []
    for start in range(before, end, longest):
        chunk = min(longest, end - start)
        seconds = steps.prefill(batch, chunk, start, max(count // 3, 1))
        parts.append((seconds, prefill_work(subject.cost, batch, chunk, start, rates)))
    seconds = StepSeconds(
        on_device=sum(seconds.on_device for seconds, _ in parts),
        wall=sum(seconds.wall for seconds, _ in parts),
        fits=all(seconds.fits for seconds, _ in parts),
    )
    work = Work(
        seconds=sum(work.seconds for _, work in parts),
        num_bytes=sum(work.num_bytes for _, work in parts),
        flops=sum(work.flops for _, work in parts),
    )
    size = {"batch": batch, "tokens": length, "before": before, "steps": len(parts)}
    row = subject.labels | size | _figures(seconds, work)
    return row | {"tokens_per_s": batch * length / seconds.wall}


def mixed_sections(run: Run, stage: Stage) -> list[Section]:
    """Return a section for each model; a small one takes 3 s to build and to size."""
    return [
        Section(
            f"{name}: a prompt beside decodes",
            partial(measure_mixed, run, stage, name),
            2 if name == run.scale.model else 4,
        )
        for name in run.scale.mixed
    ]


def measure_mixed(run: Run, stage: Stage, name: str) -> None:
    """Compare what a step with a prompt beside decodes takes the host and the device."""
    steps, scale = stage.steps(name), run.scale
    num_tokens, decodes, context = scale.mixed_step
    eager, replayed = steps.mixed(num_tokens, decodes, context, scale.count)
    row: Row = stage.subject(name).labels | {"tokens": num_tokens, "decodes": decodes}
    row |= {"host_ms": eager.host * 1e3, "step_ms": eager.on_device * 1e3}
    if replayed is not None:
        row |= {"graph_host_ms": replayed.host * 1e3, "graph_ms": replayed.on_device * 1e3}
    run.figures["mixed"].append(row)


def graph_sections(run: Run, stage: Stage) -> list[Section]:
    """Return the section of captures, which take some 50 ms for each of 32 shapes."""
    return [Section("graphs", partial(measure_graphs, run, stage), 4)] if run.on_cuda else []


def measure_graphs(run: Run, stage: Stage) -> None:
    """Capture the steps of all shapes, with the seconds and the bytes that each takes."""
    stage.clear_cache()  # its graphs too
    name = run.scale.model
    steps = stage.steps(name)
    labels = stage.subject(name).labels
    run.figures["graphs"] = [
        labels
        | captured.shape._asdict()
        | {"ms": captured.seconds * 1e3, "mb": captured.num_bytes / 1e6}
        for captured in steps.capture_all()
    ]


def _figures(seconds: StepSeconds, work: Work) -> Row:
    return {
        "step_ms": seconds.on_device * 1e3,
        "wall_ms": seconds.wall * 1e3,
        "bound_ms": work.seconds * 1e3,
        "ratio": work.seconds / seconds.on_device,
        "gb_per_s": work.num_bytes / seconds.on_device / 1e9,
        "tflops": work.flops / seconds.on_device / 1e12,
        "fits": seconds.fits,
    }


# -- kernels -------------------------------------------------------------------------------


def kernel_sections(run: Run, stage: Stage) -> list[Section]:
    """Return a section for each kind of kernel.

    Attention and sampling take longest, as they are compiled for each shape.
    """
    needs_s = {
        "attention": 15,
        "GEMM": 5,
        "GEMV": 8,
        "cuBLASLt": 6,
        "step": 8,
        "sampling": 12,
        "experts": 5,
    }
    scale = run.scale
    setting = Setting(scale.kernels, run.device, run.dtype, ops_for(run.device))
    sizes = scale.kernel_batches, scale.kernel_contexts, scale.kernel_prompts
    by_kind = kernel_cases.cases(setting, *sizes)
    by_kind["experts"] = expert_cases.cases(setting, scale.experts, scale.kernel_batches)
    return [
        Section(f"kernels: {kind}", partial(measure_kernels, run, stage, cases), needs_s[kind])
        for kind, cases in by_kind.items()
    ]


def measure_kernels(run: Run, stage: Stage, cases: list[KernelCase]) -> None:
    rates = rates_of(run)
    stage.clear_cache()  # the cache fills the device
    timer = Timer(run.device)
    for case in cases:
        name = f"{case.name} {case.size}"
        if run.has_time(name, needs_s=3):
            try:
                run.figures["kernels"].append(kernel_cases.measure(case, timer, rates))
            except Exception as error:
                run.fail(name, error)
            run.release()


# -- the engine ----------------------------------------------------------------------------


def steady_sections(run: Run, stage: Stage) -> list[Section]:
    """Return a section for each batch of steady decode.

    The first one also makes the engine, with 28 graphs and two kinds of sampling to compile. The
    prompts of 256 sequences take 8 s.
    """
    return [
        Section(
            f"steady decode {batch} x {context}",
            partial(measure_steady, run, stage, batch, context),
            3 + batch * context / 30_000 + (0 if index else 20),
        )
        for index, (batch, context) in enumerate(run.scale.steady)
    ]


def measure_steady(run: Run, stage: Stage, batch: int, context: int) -> None:
    """Measure steady decode by the whole engine, and compare it with the step on the device alone.

    The device's step is forward and sampling, queued back to back. The engine's extra time is
    time in which the device waits.
    """
    rates, count = rates_of(run), run.scale.steady_count
    with stage.engine() as engine:
        subject = stage.subject(run.scale.model)
        steady = engine_steps.steady_decode(engine, batch, context, count, subject.vocab_size)
    work = decode_work(subject.cost, batch, round(steady.context), rates)
    row = subject.labels | {"batch": batch, "context": context}
    run.figures["steady"].append(
        row
        | {
            "mean_context": steady.context,
            "wall_ms": steady.wall * 1e3,
            "bound_ms": work.seconds * 1e3,
            "ratio": work.seconds / steady.wall,
            "tokens_per_s": steady.tokens_per_s,
        }
        | _beside_steps(run, row, steady.wall * 1e3)
    )


def _beside_steps(run: Run, row: Row, wall_ms: float) -> Row:
    """Return the comparison, if the decode step was measured at the same point."""
    for step in run.figures["decode"]:
        if row.items() <= step.items():
            return {"step_ms": step["step_ms"], "idle": 1 - step["step_ms"] / wall_ms}
    return {}


def measure_first_token(run: Run, stage: Stage) -> None:
    length = run.scale.cached_prompt
    with stage.engine() as engine:
        subject = stage.subject(run.scale.model)
        found = engine_steps.cached_prompt(engine, length, subject.vocab_size)
    run.figures["first_token"] = subject.labels | {
        "tokens": length,
        "found": found.num_found,
        "cached_ms": found.cached.seconds * 1e3,
        "cached_host_ms": found.cached.host * 1e3,
        "cold_ms": found.cold.seconds * 1e3,
        "cold_host_ms": found.cold.host * 1e3,
    }


# -- whole workloads -----------------------------------------------------------------------


def offline_sections(run: Run, stage: Stage) -> list[Section]:
    """Return a section for each workload, the largest of which takes 26 s."""
    workloads = dict.fromkeys((run.scale.single, run.scale.peer, *run.scale.offline))
    return [
        Section(
            f"offline, {workload.name}",
            partial(measure_offline, run, stage, workload),
            3 + workload.num_output / 10_000,
        )
        for workload in workloads
    ]


def measure_offline(run: Run, stage: Stage, workload: Workload) -> None:
    rates = rates_of(run)
    with stage.engine() as engine:
        subject = stage.subject(run.scale.model)
        requests = workload.requests(subject.vocab_size)
        ideal_s = ideal_seconds(subject.cost, workload.lengths, rates)
        before = engine.figures()
        outcome = workloads.offline(engine, requests, run.deadline(3 * ideal_s + 30))
        after = engine.figures()
    row = _end_to_end(subject.labels, workload, "engine", outcome.figures())
    row |= _beside_ideal(row, workload, ideal_s)
    row["steps"] = after.num_steps - before.num_steps
    row["preemptions"] = after.num_preemptions - before.num_preemptions
    run.figures["end_to_end"].append(row)


def http_section(run: Run, stage: Stage) -> Section:
    """Return the section over HTTP, whose client takes 5 s to start."""
    needs_s = 10 + run.scale.http.num_output / 10_000
    return Section("over HTTP", partial(measure_http, run, stage), needs_s)


def measure_http(run: Run, stage: Stage) -> None:
    rates, workload = rates_of(run), run.scale.http
    with stage.engine() as engine:
        subject = stage.subject(run.scale.model)
        ideal_s = ideal_seconds(subject.cost, workload.lengths, rates)
        figures = workloads.over_http(engine, workload, run.deadline(3 * ideal_s + 30))
    stage.clear_cache()  # the server has closed the engine
    row = _end_to_end(subject.labels, workload, "http", figures)
    run.figures["end_to_end"].append(row | _beside_ideal(row, workload, ideal_s))


def peer_sections(run: Run, stage: Stage) -> list[Section]:
    """Return the sections of transformers.

    `generate` takes 30 ms a token, continuous batching some 20 s to set up and 100 ms a step, and
    building the model again 5 s.
    """
    share = None if run.on_cuda else 0.1
    continuous = partial(workloads.continuous, memory_share=share)
    scale = run.scale
    return [
        Section(
            "transformers: generate",
            partial(measure_peer, run, stage, "generate", workloads.generate, scale.single),
            15,
        ),
        Section(
            "transformers: continuous batching",
            partial(measure_peer, run, stage, "continuous", continuous, scale.peer),
            45,
        ),
    ]


def measure_peer(
    run: Run, stage: Stage, by: str, work: Callable[..., Outcome], workload: Workload
) -> None:
    model = stage.peer(run.scale.model)
    labels = {"model": run.scale.model, "dtype": str(run.dtype).removeprefix("torch.")}
    outcome = work(model, workload, run.deadline(80))
    run.figures["end_to_end"].append(_end_to_end(labels, workload, by, outcome.figures()))


def _end_to_end(labels: dict[str, str], workload: Workload, by: str, outcome: Row) -> Row:
    return labels | {"workload": workload.name, "by": by} | outcome


def _beside_ideal(row: Row, workload: Workload, ideal_s: float) -> dict[str, float]:
    ideal = workload.num_output / ideal_s
    return {"ideal_tokens_per_s": ideal, "ratio": row["tokens_per_s"] / ideal}


# -- cold start ----------------------------------------------------------------------------


def measure_cold_start(run: Run, stage: Stage) -> None:
    """Write a checkpoint once, and start the server on it `starts` times.

    The first start fills the caches of compiled kernels. Building the model takes 5 s, writing
    its 16 GB 20 s, and each start with its graphs 15 s.
    """
    scale = run.scale
    try:
        with cold_start.checkpoint(stage.peer(scale.model)) as folder:
            stage.clear()
            for number in range(1, scale.starts + 1):
                if run.has_time(f"cold start {number}", needs_s=15):
                    started = cold_start.start(folder, run.deadline())
                    row = {"model": scale.model, "start": number} | started.figures()
                    run.figures["cold_start"].append(row)
                    run.write()
    except cold_start.NoRoom as reason:
        raise NothingToMeasure(str(reason)) from None
