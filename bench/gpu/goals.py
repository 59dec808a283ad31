"""The goals of the GPU path, and whether a run met them.

This module turns the JSON of a run into Markdown. It also names what a run did not measure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Figures = dict[str, Any]

MODEL = "Llama-3.1-8B"
CONTEXT = 1024
WHOLE = "256 x 1000 in, 1000 out"
PEER = "64 x 1000 in, 128 out"
SINGLE = "1 x 1000 in, 128 out"
CACHED_TOKENS = 32768
PROMPT_TOKENS = 8192
ATTENTION = (32, 4096)
OTHERS = ("Qwen3-8B", "Gemma-2-9B", "Mixtral-8x7B-8-layers", "Phi-3-mini", "gpt2-xl")
BATCHES = (1, 32, 256)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run measured for a goal; `met` is None if that does not decide the goal."""

    text: str
    met: bool | None


_NOT_MEASURED = Measured("not measured", None)


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal; `measure` finds its figure in a run, or returns None."""

    name: str
    asked: str
    measure: Callable[[Figures], Measured | None]


def goals() -> list[Goal]:
    others = [
        Goal(f"{name}: decode in full graphs", "all of its steps", _model_in_graphs(name))
        for name in OTHERS
    ]
    return [
        Goal("decode, batch 1 x 1k", "85% of the bound (88% the aim)", _engine_decode(1, 0.85)),
        Goal("decode, batch 32 x 1k", "80% of the bound", _engine_decode(32, 0.80)),
        Goal("decode, batch 256 x 1k", "80% of the bound", _engine_decode(256, 0.80)),
        Goal("GPU idle between decode steps", "at most 1%", _idle),
        Goal("decode attention, 32 x 4k", "85% of a copy's bandwidth", _attention),
        Goal("prefill of 8k tokens", "65% of the GEMM rate", _prefill),
        Goal("1000 in, 1000 out, 256 offline", "80% of the ideal", _offline),
        Goal("the same over HTTP, 256 streams", "97% of offline", _http),
        Goal("transformers' continuous batching, sdpa", "8 times it", _peer("continuous", PEER, 8)),
        Goal("transformers' generate, batch 1", "4 times it", _peer("generate", SINGLE, 4)),
        Goal("first token of a cached 32k prompt", "at most 10 ms", _first_token),
        Goal("process start to first token", "at most 12 s", _cold_start("first_token_s")),
        Goal("process start to every graph", "at most 12 s", _cold_start("prepared_s")),
        *others,
    ]


def goals_table(figures: Figures) -> str:
    lines = ["| goal | asked | measured | met |", "|---|---|---|---|"]
    for goal in goals():
        measured = goal.measure(figures) or _NOT_MEASURED
        met = {True: "yes", False: "no", None: "-"}[measured.met]
        lines.append(f"| {goal.name} | {goal.asked} | {measured.text} | {met} |")
    return "\n".join(lines)


def _row(rows: list[Figures], **wanted: Any) -> Figures | None:
    """Return the last row with these values."""
    return next((row for row in reversed(rows) if wanted.items() <= row.items()), None)


# -- the first model -----------------------------------------------------------------------


def _engine_decode(batch: int, asked: float) -> Callable[[Figures], Measured | None]:
    """Measure decode by the whole engine; the steps on the device alone do not decide the goal."""
    place = {"model": MODEL, "batch": batch, "context": CONTEXT}

    def measure(figures: Figures) -> Measured | None:
        steady, steps = _row(figures["steady"], **place), _row(figures["decode"], **place)
        alone = (
            f"its steps alone {steps['ratio']:.1%}" if steps else "its steps alone: not measured"
        )
        if steady is None:
            return Measured(f"engine: not measured, {alone}", None) if steps else None
        text = f"{steady['ratio']:.1%}, {steady['tokens_per_s']:,.0f} tokens/s ({alone})"
        return Measured(text, steady["ratio"] >= asked)

    return measure


def _idle(figures: Figures) -> Measured | None:
    """Measure idle time: the worst batch counts, and all batches must be measured."""
    rows = [_row(figures["steady"], model=MODEL, batch=batch, context=CONTEXT) for batch in BATCHES]
    shares = {row["batch"]: row["idle"] for row in rows if row is not None and "idle" in row}
    if not shares:
        return None
    text = ", ".join(f"{share:.1%} at {batch}" for batch, share in shares.items())
    is_met = max(shares.values()) <= 0.01
    return Measured(text, is_met if len(shares) == len(BATCHES) or not is_met else None)


def _attention(figures: Figures) -> Measured | None:
    batch, context = ATTENTION
    row = _row(figures["kernels"], kernel="decode attention", batch=batch, context=context)
    if row is None or figures["ceilings"] is None:
        return None
    share = row["gb_per_s"] / figures["ceilings"]["copy_gb_per_s"]
    return Measured(f"{share:.1%}, {row['gb_per_s']:,.0f} GB/s", share >= 0.85)


def _prefill(figures: Figures) -> Measured | None:
    row = _row(figures["prefill"], model=MODEL, batch=1, tokens=PROMPT_TOKENS, before=0)
    if row is None or figures["ceilings"] is None:
        return None
    share = row["tflops"] / figures["ceilings"]["tflops"]
    steps = f"in {row['steps']} steps" if row["steps"] > 1 else "in one step"
    return Measured(f"{share:.1%}, {row['tflops']:.0f} TFLOP/s {steps}", share >= 0.65)


def _by(figures: Figures, by: str, workload: str) -> Figures | None:
    return _row(figures["end_to_end"], model=MODEL, by=by, workload=workload)


def _offline(figures: Figures) -> Measured | None:
    row = _by(figures, "engine", WHOLE)
    if row is None:
        return None
    text = f"{row['ratio']:.1%}, {row['tokens_per_s']:,.0f} tokens/s"
    return _of_whole(text, row["ratio"] >= 0.80, row)


def _http(figures: Figures) -> Measured | None:
    offline, http = _by(figures, "engine", WHOLE), _by(figures, "http", WHOLE)
    if offline is None or http is None:
        return None
    share = http["tokens_per_s"] / offline["tokens_per_s"]
    text = f"{share:.1%}, {http['tokens_per_s']:,.0f} tokens/s"
    return _of_whole(text, share >= 0.97, offline, http)


def _peer(by: str, workload: str, asked: float) -> Callable[[Figures], Measured | None]:
    def measure(figures: Figures) -> Measured | None:
        engine, peer = _by(figures, "engine", workload), _by(figures, by, workload)
        if engine is None or peer is None:
            return None
        if not peer["tokens_per_s"]:
            return Measured("it finished no request in its time", None)
        times = engine["tokens_per_s"] / peer["tokens_per_s"]
        text = f"{times:.1f} times ({engine['tokens_per_s']:,.0f}, {peer['tokens_per_s']:,.0f})"
        return _of_whole(text, times >= asked, engine, peer)

    return measure


def _of_whole(text: str, is_met: bool, *rows: Figures) -> Measured:
    """Return the figure of whole workloads; one that was cut short does not decide the goal."""
    if all(row["finished"] for row in rows):
        return Measured(text, is_met)
    return Measured(f"{text}, cut short", None)


def _first_token(figures: Figures) -> Measured | None:
    row = figures["first_token"]
    if row is None or row["model"] != MODEL or row["tokens"] != CACHED_TOKENS:
        return None
    text = f"{row['cached_ms']:.1f} ms, {row['cached_host_ms']:.1f} until it was launched"
    return Measured(f"{text} (cold {row['cold_ms']:,.0f})", row["cached_ms"] <= 10)


def _cold_start(figure: str) -> Callable[[Figures], Measured | None]:
    """Measure a cold start; only one with compiled kernels decides the goal."""

    def measure(figures: Figures) -> Measured | None:
        row = _row(figures["cold_start"], model=MODEL)
        if row is None:
            return None
        if row["start"] == 1:
            return Measured(f"{row[figure]:.1f} s, kernels to be compiled", None)
        return Measured(f"{row[figure]:.1f} s", row[figure] <= 12)

    return measure


# -- the other models ----------------------------------------------------------------------


def _model_in_graphs(name: str) -> Callable[[Figures], Measured | None]:
    """Measure whether decode steps at about 1k run from graphs, with their shares of the bound."""

    def measure(figures: Figures) -> Measured | None:
        rows = [
            row
            for batch in BATCHES
            if (row := _row(figures["decode"], model=name, batch=batch)) is not None
        ]
        if not rows:
            return None
        shares = ", ".join(f"{row['ratio']:.0%} at {row['batch']}" for row in rows)
        without = [str(row["batch"]) for row in rows if not row["in_graph"]]
        if without:
            return Measured(f"no graph at {', '.join(without)}; {shares} of its bound", False)
        model = _row(figures["models"], model=name) or {}
        text = f"{model.get('graphs', 'its')} graphs; {shares} of its bound"
        return Measured(text, True if len(rows) == len(BATCHES) else None)

    return measure
