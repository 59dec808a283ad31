"""The GPU benchmark: its bounds are arithmetic, and every section runs, here on the CPU."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import gpu
from bench.bounds import decode_bound_s, linear_weights, prefill_flops
from bench.device import Ceilings
from bench.gpu import Scale, main, rewrite_table, table
from engine.kv_cache import AttentionCall
from kernels.paged_attention import MaskSpec

CEILINGS = Ceilings(bytes_per_s=1e9, flops_per_s=1e10, launch_s=1e-6)
TINY = Scale(
    models=("tiny",),
    batches=(1, 3),
    contexts=(32,),
    prompt_lens=(48,),
    num_requests=3,
    request_len=8,
    mixed_requests=3,
    longest_mixed=12,
    seconds=400,
)


def call(window: int = 1 << 30) -> AttentionCall:
    return AttentionCall(nn.Identity(), 4, 2, 8, 8, MaskSpec(window=window))


def test_a_small_batch_is_bound_by_reading_the_weights() -> None:
    weights = [torch.empty(100, 50, dtype=torch.bfloat16)]
    seconds = decode_bound_s(weights, [], 1, 1000, 2, CEILINGS)
    assert seconds == pytest.approx(100 * 50 * 2 / 1e9)


def test_a_large_batch_is_bound_by_computing() -> None:
    weights = [torch.empty(100, 50, dtype=torch.bfloat16)]
    seconds = decode_bound_s(weights, [], 1000, 1, 2, CEILINGS)
    assert seconds == pytest.approx(2 * 100 * 50 * 1000 / 1e10)


def test_each_sequence_reads_its_own_context_as_far_as_the_window_goes() -> None:
    one = decode_bound_s([], [call()], 1, 100, 2, CEILINGS)
    assert one == pytest.approx(100 * 2 * 16 * 2 / 1e9)
    assert decode_bound_s([], [call()], 7, 100, 2, CEILINGS) == pytest.approx(7 * one)
    assert decode_bound_s([], [call(window=10)], 1, 100, 2, CEILINGS) == pytest.approx(one / 10)


def test_a_prefill_computes_half_of_a_square() -> None:
    head = torch.empty(10, 4)
    attention = prefill_flops([head], [call()], 3) - 2 * head.numel()
    assert attention == 2 * (1 + 2 + 3) * 4 * 16
    windowed = prefill_flops([head], [call(window=2)], 3) - 2 * head.numel()
    assert windowed == 2 * (1 + 2 + 2) * 4 * 16


def test_shared_weights_are_read_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(9, 4))
    model[1].weight = model[0].weight
    assert len(linear_weights(model)) == 1


@pytest.mark.slow
def test_every_section_runs_and_is_written(tmp_path: Path) -> None:
    main(["--out", str(tmp_path)], device="cpu", scale=TINY)
    (path,) = tmp_path.glob("*-cpu.json")
    figures = json.loads(path.read_text())
    assert figures["errors"] == {}
    assert figures["skipped"] == []
    assert {"device", "versions", "ceilings", "kernels", "decode", "prefill", "end_to_end"} <= set(
        figures
    )
    assert len(figures["decode"]) == 2
    assert {"model", "dtype", "batch", "context", "step_ms", "bound_ms", "ratio"} == set(
        figures["decode"][0]
    )
    assert {row["kernel"] for row in figures["kernels"]} == set(gpu.KERNELS)
    assert all(row["tflops"] > 0 for row in figures["prefill"])
    assert any("generate" in row for row in figures["end_to_end"])
    assert any(row["workload"] == "HTTP" for row in figures["end_to_end"])


def test_what_fails_is_noted_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(gpu, "measure_kernels", fail)
    main(["--out", str(tmp_path), "--only", "kernels,decode"], device="cpu", scale=TINY)
    figures = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert "illegal memory access" in figures["errors"]["kernels"]
    assert figures["decode"]


def test_what_the_time_does_not_reach_is_listed(tmp_path: Path) -> None:
    hurried = Scale(**{name: getattr(TINY, name) for name in TINY.__slots__} | {"seconds": 0})
    main(["--out", str(tmp_path)], device="cpu", scale=hurried)
    figures = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert figures["skipped"]
    assert not figures["decode"]


def test_the_table_is_made_from_the_results(tmp_path: Path) -> None:
    row = {"model": "M", "batch": 8, "context": 1024, "step_ms": 4.0, "bound_ms": 3.2, "ratio": 0.8}
    (tmp_path / "2026-01-01-h200.json").write_text(json.dumps({"device": "H200", "decode": [row]}))
    (tmp_path / "2026-01-01-cpu.json").write_text(json.dumps({"rows": []}))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- gpu table -->\nold\n<!-- end of gpu table -->\nafter\n")
    rewrite_table(readme, tmp_path)
    text = readme.read_text()
    assert "| H200 | M | 8 | 1024 | 4.00 | 3.20 | 80% |" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "No GPU" in table([])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        main([])
