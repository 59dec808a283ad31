"""What becomes of the figures: files that are never overwritten, and tables in a README."""

import json
from pathlib import Path
from typing import Any

from bench.gpu.report import (
    load_results,
    newest,
    render,
    result_path,
    rewrite_table,
)

README = "before\n<!-- gpu table -->\nold\n<!-- end of gpu table -->\nafter\n"


def decode_row(batch: int = 8, context: int = 1024, **others: Any) -> dict[str, Any]:
    row = {"model": "M-8B", "dtype": "bfloat16", "batch": batch, "context": context}
    return (
        row
        | {"step_ms": 4.0, "bound_ms": 3.2, "ratio": 0.8}
        | {"fits": True, "in_graph": True}
        | others
    )


def end_row(by: str, tokens_per_s: float, **others: Any) -> dict[str, Any]:
    row = {"model": "M-8B", "workload": "many", "by": by, "tokens_per_s": tokens_per_s}
    return row | {"finished": True} | others


def figures(**others: Any) -> dict[str, Any]:
    return {
        "device": "NVIDIA H200",
        "versions": {"torch": "2.11.0"},
        "started": "2026-01-01T10:00:00+00:00",
        "scale": "full",
        "ceilings": {"gb_per_s": 4321.0, "tflops": 788.0, "kernel_us": 1.4, "launch_us": 3.0},
        "models": [],
        "kernels": [],
        "decode": [decode_row()],
        "prefill": [],
        "steady": [],
        "first_token": None,
        "end_to_end": [],
        "cold_start": [],
        "skipped": [],
        "errors": {},
    } | others


def test_results_are_named_by_date_and_device(tmp_path: Path) -> None:
    path = result_path(tmp_path, "2026-01-01", "NVIDIA H100 80GB HBM3", "full")
    assert path == tmp_path / "2026-01-01-nvidia-h100-80gb-hbm3.json"
    quick = result_path(tmp_path, "2026-01-01", "NVIDIA H200", "quick")
    assert quick == tmp_path / "2026-01-01-nvidia-h200-quick.json"


def test_a_run_never_overwrites_another(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        path = result_path(tmp_path, "2026-01-01", "H200", "full")
        path.touch()
        names.append(path.name)
    assert names == ["2026-01-01-h200.json", "2026-01-01-h200-2.json", "2026-01-01-h200-3.json"]


def test_only_gpu_runs_are_results(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(figures()))
    (tmp_path / "b.json").write_text(json.dumps(figures(device="cpu")))
    (tmp_path / "c.json").write_text(json.dumps({"device": "x86_64 CPU", "rows": []}))
    assert [result["file"] for result in load_results(tmp_path)] == ["a.json"]


def test_each_device_has_its_last_full_run_with_decode_steps() -> None:
    runs = [
        figures(file="full"),
        figures(file="full, later"),
        figures(file="of kernels", decode=[]),
        figures(file="quick", scale="quick"),
        figures(file="another device", device="H100", scale="quick"),
    ]
    assert [run["file"] for run in newest(runs)] == ["full, later", "another device"]


def test_the_table_replaces_what_is_between_the_marks(tmp_path: Path) -> None:
    (tmp_path / "2026-01-01-nvidia-h200.json").write_text(json.dumps(figures()))
    readme = tmp_path / "README.md"
    readme.write_text(README)
    for _ in range(2):  # again changes nothing
        rewrite_table(readme, tmp_path)
        text = readme.read_text()
        assert text.startswith("before\n<!-- gpu table -->\n### NVIDIA H200\n")
        assert text.endswith("\n<!-- end of gpu table -->\nafter\n")
        assert text.count("NVIDIA H200") == 1
        assert "old" not in text
        assert "results/2026-01-01-nvidia-h200.json" in text


def test_without_results_the_table_says_so(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README)
    rewrite_table(readme, tmp_path)
    assert "No GPU has been measured yet." in readme.read_text()


def test_decode_steps_are_a_line_for_each_batch() -> None:
    rows = [
        decode_row(1, 128, step_ms=3.5, ratio=0.9),
        decode_row(1, 8192, step_ms=3.75, ratio=0.85),
        decode_row(256, 128, step_ms=6.0, ratio=0.75),
    ]
    text = render([figures(decode=rows, file="f.json")])
    assert "| model | type | batch | 128 tokens | 8,192 tokens |" in text
    assert "| M-8B | bfloat16 | 1 | 3.50, 90% | 3.75, 85% |" in text
    assert "| M-8B | bfloat16 | 256 | 6.00, 75% | - |" in text
    assert "share blocks" not in text


def test_a_batch_that_does_not_fit_is_marked() -> None:
    text = render([figures(decode=[decode_row(fits=False)], file="f.json")])
    assert "| 4.00, 80% * |" in text
    assert "share blocks" in text


def test_the_engine_is_beside_whoever_did_the_same_workload() -> None:
    rows = [
        end_row("engine", 9000.0, ratio=0.75),
        end_row("http", 8820.0, ratio=0.735),
        end_row("generate", 1500.0),
        end_row("continuous", 3000.0, finished=False),
    ]
    text = render([figures(end_to_end=rows, file="f.json")])
    (line,) = [line for line in text.splitlines() if "| many |" in line]
    assert line == (
        "| M-8B | many | 9,000 | 8,820 (engine 1.02 x) | 1,500 (engine 6.00 x) "
        "| 3,000 * (engine 3.00 x) | 75% |"
    )
    assert "Cut short" in text


def test_kernels_and_prompts_have_tables_of_their_own() -> None:
    kernel = {"kernel": "norm", "batch": 32, "us": 2.25, "gb_per_s": 1234.5, "tflops": 0.0}
    prefill = decode_row(1, 0, tokens=8192, before=0, step_ms=88.0, tflops=655.0, ratio=0.83)
    prefill["steps"] = 2
    parts = {"kernels": [kernel | {"ratio": 0.29}], "prefill": [prefill]}
    text = render([figures(**parts, file="f.json")])
    assert "| norm | 32 | - | 2.2 | 1,234 | - | 29% |" in text
    assert "| M-8B | 1 | 8192 | 0 | 2 | 88.0 | 655 | 83% |" in text


def test_steps_without_a_graph_are_marked() -> None:
    text = render([figures(decode=[decode_row(in_graph=False)], file="f.json")])
    assert "| 4.00, 80% † |" in text
    assert "as there was no graph" in text


def test_the_engine_s_own_steps_first_tokens_and_starts_have_tables() -> None:
    steady = {"model": "M", "batch": 32, "mean_context": 1031.5, "wall_ms": 5.0, "ratio": 0.81}
    first = {"model": "M", "tokens": 32768, "found": 32752, "cached_ms": 8.25, "cold_ms": 1234.0}
    start = {"model": "M", "start": 2, "first_token_s": 9.5, "prepared_s": 11.25}
    text = render(
        [
            figures(
                steady=[steady | {"step_ms": 4.95, "idle": 0.01, "tokens_per_s": 6400.0}],
                first_token=first | {"cached_host_ms": 3.1, "cold_host_ms": 40.0},
                cold_start=[start | {"phases": {"import": 4.0, "graphs": 3.25}}],
                file="f.json",
            )
        ]
    )
    assert "| M | 32 | 1032 | 5.00 | 4.95 | 1.0% | 6,400 | 81% |" in text
    assert "| M | 32,768 | 0 | 1234.0 | 40.0 |" in text
    assert "| M | 32,768 | 32,752 | 8.2 | 3.1 |" in text
    assert "| M | 2 | 9.5 | 11.2 | import 4.0, graphs 3.2 |" in text


def test_mixed_steps_and_captures_have_tables() -> None:
    mixed = {"model": "M", "tokens": 300, "decodes": 32, "host_ms": 8.5, "step_ms": 6.25}
    graph = {"model": "M", "tokens": 512, "rows": 256, "prefills": True, "ms": 61.0, "mb": 2.5}
    text = render(
        [
            figures(
                mixed=[mixed, mixed | {"graph_host_ms": 0.25, "graph_ms": 7.5}],
                graphs=[graph, graph | {"rows": 512, "prefills": False}],
                file="f.json",
            )
        ]
    )
    assert "| M | 300 | 32 | 8.50 | 6.25 | - | - |" in text
    assert "| M | 300 | 32 | 8.50 | 6.25 | 0.25 | 7.50 |" in text
    assert "| M | prefills | 512 | 256 | 61 | 2.5 |" in text
    assert "| M | decodes | 512 | 512 | 61 | 2.5 |" in text


def test_the_goals_come_first() -> None:
    text = render([figures(file="f.json")])
    assert text.index("| goal | asked | measured | met |") < text.index("| model | type | batch |")


def test_what_is_missing_is_told() -> None:
    skipped = [{"section": "Q: load", "reason": "takes some 40 s, and 3 are left"}]
    text = render([figures(skipped=skipped, errors={"kernels": "OSError: no"}, file="f.json")])
    assert "Not measured: Q: load (takes some 40 s, and 3 are left)." in text
    assert "Failed: kernels (OSError: no)." in text


def test_a_part_that_was_not_measured_has_no_table_but_the_goals() -> None:
    text = render([figures(decode=[], file="f.json")])
    headings = [line for line in text.splitlines() if line.startswith("|---")]
    assert headings == ["|---|---|---|---|"]
