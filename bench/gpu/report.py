"""The figures of GPU runs: where they are kept, and the tables made from them.

This module turns the JSON of a run into Markdown, and knows nothing of how it was measured.
"""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from bench.gpu.goals import goals_table

Figures = dict[str, Any]

_MARKS = ("<!-- gpu table -->", "<!-- end of gpu table -->")
_NOTHING = "No GPU has been measured yet."
_SERVERS = ("engine", "http", "generate", "continuous")
_ABSENT = "-"


def result_path(folder: Path, date: str, device: str, scale: str) -> Path:
    """Return the path of a new file; a run never overwrites another."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    stem = f"{date}-{slug}" if scale == "full" else f"{date}-{slug}-{scale}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    return next(path for name in names if not (path := folder / f"{name}.json").exists())


def load_results(folder: Path) -> list[Figures]:
    """Return the results of GPUs in the folder, the oldest first."""
    found = []
    for path in folder.glob("*.json"):
        figures = json.loads(path.read_text())
        if {"ceilings", "decode", "end_to_end"} <= figures.keys() and figures["device"] != "cpu":
            found.append(figures | {"file": path.name})
    return sorted(found, key=lambda figures: (figures["started"], figures["file"]))


def newest(results: Sequence[Figures]) -> list[Figures]:
    """Return one run of each device: its last full run with decode steps, else its best other."""
    chosen: dict[str, Figures] = {}
    for figures in results:
        best = chosen.get(figures["device"])
        if best is None or _worth(figures) >= _worth(best):
            chosen[figures["device"]] = figures
    return list(chosen.values())


def _worth(figures: Figures) -> tuple[bool, bool]:
    return bool(figures["decode"]), figures["scale"] == "full"


def rewrite_table(readme: Path, folder: Path) -> None:
    """Rewrite the tables between the marks in the README, from the results in the folder."""
    body = render(newest(load_results(folder)))
    before, _, rest = readme.read_text().partition(_MARKS[0])
    _, _, after = rest.partition(_MARKS[1])
    readme.write_text(f"{before}{_MARKS[0]}\n{body}\n{_MARKS[1]}{after}")


def render(results: Sequence[Figures]) -> str:
    return "\n\n".join(map(_render_run, results)) or _NOTHING


def _render_run(figures: Figures) -> str:
    parts = [
        f"### {figures['device']}",
        _introduction(figures),
        _titled("Goals", goals_table(figures)),
        _titled("Decode steps: milliseconds, and the share of the bound", _decode(figures)),
        _titled("Prefill steps", _prefill(figures)),
        _titled("A prompt beside decodes: milliseconds of host and device", _mixed(figures)),
        _titled("Capturing the steps of a shape", _graphs(figures)),
        _titled("The engine in steady decode: a step as the host sees it", _steady(figures)),
        _titled("First token of a prompt, in milliseconds", _first_token(figures)),
        _titled("End to end: output tokens a second", _end_to_end(figures)),
        _titled("From the start of the process, in seconds", _cold_start(figures)),
        _titled("Kernels", _kernels(figures)),
        _missing(figures),
    ]
    return "\n\n".join(part for part in parts if part)


def _introduction(figures: Figures) -> str:
    ceilings, versions = figures["ceilings"] or {}, figures["versions"]
    measured = ", ".join(
        f"{ceilings[name]:,.{digits}f} {unit}"
        for name, digits, unit in (
            ("gb_per_s", 0, "GB/s"),
            ("tflops", 0, "TFLOP/s"),
            ("kernel_us", 1, "us a kernel in a graph"),
            ("launch_us", 1, "us a launch"),
        )
        if name in ceilings
    )
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"Ceilings: {measured}. {software}.\nFrom `results/{figures['file']}`."


def _titled(title: str, table: str | None) -> str | None:
    return table and f"{title}:\n\n{table}"


def _decode(figures: Figures) -> str | None:
    rows = figures["decode"]
    contexts = sorted({row["context"] for row in rows})
    by_place = {(row["model"], row["dtype"], row["batch"], row["context"]): row for row in rows}
    lines = []
    for model, dtype, batch in dict.fromkeys(place[:3] for place in by_place):
        cells = [by_place.get((model, dtype, batch, context)) for context in contexts]
        shown = [_ABSENT if row is None else _step(row) for row in cells]
        lines.append([model, dtype, batch, *shown])
    headings = [f"{context:,} tokens" for context in contexts]
    return _table(["model", "type", "batch", *headings], lines)


def _step(row: Figures) -> str:
    marks = ("" if row["fits"] else " *") + ("" if row["in_graph"] else " †")
    return f"{row['step_ms']:.2f}, {row['ratio']:.0%}{marks}"


def _prefill(figures: Figures) -> str | None:
    return _table(
        ["model", "prompts", "tokens each", "before", "steps", "ms", "TFLOP/s", "of the bound"],
        [
            [
                row["model"],
                row["batch"],
                row["tokens"],
                row["before"],
                row["steps"],
                f"{row['step_ms']:.1f}",
                f"{row['tflops']:.0f}",
                f"{row['ratio']:.0%}",
            ]
            for row in figures["prefill"]
        ],
    )


def _mixed(figures: Figures) -> str | None:
    return _table(
        ["model", "prompt", "decodes", "host", "device", "host, from graphs", "device"],
        [
            [row["model"], row["tokens"], row["decodes"]]
            + [
                f"{row[name]:.2f}" if name in row else _ABSENT
                for name in ("host_ms", "step_ms", "graph_host_ms", "graph_ms")
            ]
            for row in figures.get("mixed", [])
        ],
    )


def _graphs(figures: Figures) -> str | None:
    return _table(
        ["model", "steps", "tokens", "sampled rows", "ms", "MB"],
        [
            [
                row["model"],
                "prefills" if row["prefills"] else "decodes",
                row["tokens"],
                row["rows"],
                f"{row['ms']:.0f}",
                f"{row['mb']:.1f}",
            ]
            for row in figures.get("graphs", [])
        ],
    )


def _steady(figures: Figures) -> str | None:
    return _table(
        ["model", "batch", "context", "ms", "on the device", "idle", "tokens/s", "of the bound"],
        [
            [
                row["model"],
                row["batch"],
                f"{row['mean_context']:.0f}",
                f"{row['wall_ms']:.2f}",
                f"{row['step_ms']:.2f}" if "step_ms" in row else _ABSENT,
                f"{row['idle']:.1%}" if "idle" in row else _ABSENT,
                f"{row['tokens_per_s']:,.0f}",
                _share(row),
            ]
            for row in figures["steady"]
        ],
    )


def _first_token(figures: Figures) -> str | None:
    row = figures["first_token"]
    if row is None:
        return None
    lines = [
        [row["model"], f"{row['tokens']:,}", found, f"{row[name + '_ms']:.1f}", f"{host:.1f}"]
        for name, found, host in (
            ("cold", 0, row["cold_host_ms"]),
            ("cached", f"{row['found']:,}", row["cached_host_ms"]),
        )
    ]
    return _table(["model", "tokens", "of them cached", "ms", "until it is launched"], lines)


def _cold_start(figures: Figures) -> str | None:
    """Phases may end after the first token: graphs are captured when there is time."""
    return _table(
        ["model", "start", "first token", "every graph", "phases"],
        [
            [
                row["model"],
                row["start"],
                f"{row['first_token_s']:.1f}",
                f"{row['prepared_s']:.1f}",
                ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["phases"].items()),
            ]
            for row in figures["cold_start"]
        ],
    )


def _end_to_end(figures: Figures) -> str | None:
    """Make a line for each workload, with the engine's ratio to the other servers."""
    workloads: dict[tuple[str, str], dict[str, Figures]] = {}
    for row in figures["end_to_end"]:
        workloads.setdefault((row["model"], row["workload"]), {})[row["by"]] = row
    lines = []
    for (model, workload), by in workloads.items():
        engine = by.get("engine")
        shown = [_rate(by.get(server), engine) for server in _SERVERS]
        lines.append([model, workload, *shown, _ABSENT if engine is None else _share(engine)])
    return _table(["model", "workload", *_SERVERS, "engine of the ideal"], lines)


def _rate(row: Figures | None, engine: Figures | None) -> str:
    if row is None:
        return _ABSENT
    star = "" if row["finished"] else " *"
    text = f"{row['tokens_per_s']:,.0f}{star}"
    if engine is None or row is engine or not row["tokens_per_s"]:
        return text
    return f"{text} (engine {engine['tokens_per_s'] / row['tokens_per_s']:.2f} x)"


def _share(row: Figures) -> str:
    return f"{row['ratio']:.0%}"


def _kernels(figures: Figures) -> str | None:
    return _table(
        ["kernel", "batch", "context", "us", "GB/s", "TFLOP/s", "of the bound"],
        [
            [
                row["kernel"],
                row["batch"],
                row.get("context", _ABSENT),
                f"{row['us']:.1f}",
                f"{row['gb_per_s']:,.0f}",
                f"{row['tflops']:.1f}" if row["tflops"] else _ABSENT,
                _share(row),
            ]
            for row in figures["kernels"]
        ],
    )


def _missing(figures: Figures) -> str | None:
    """Return notes on figures that are missing or were measured in an unusual way."""
    lines = []
    if any(not row["fits"] for row in figures["decode"]):
        lines.append("\\* The cache is too small: sequences share blocks.")
    if any(not row["in_graph"] for row in figures["decode"]):
        lines.append("† Launched kernel by kernel, as there was no graph.")
    if any(not row["finished"] for row in figures["end_to_end"]):
        lines.append("\\* Cut short by the time limit, or with failed requests.")
    lines += [f"Not measured: {s['section']} ({s['reason']})." for s in figures["skipped"]]
    lines += [f"Failed: {name} ({error})." for name, error in figures["errors"].items()]
    return "\n".join(lines) or None


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str | None:
    """Return a Markdown table, or None if there are no rows."""
    if not rows:
        return None
    lines = [_line(headings), "|---" * len(headings) + "|", *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
