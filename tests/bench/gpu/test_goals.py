"""The table of goals: each is found in a run's figures, met or not, or said to be missing."""

from typing import Any

import pytest

from bench.gpu.goals import (
    ATTENTION,
    BATCHES,
    CACHED_TOKENS,
    CONTEXT,
    MODEL,
    OTHERS,
    PEER,
    PROMPT_TOKENS,
    SINGLE,
    WHOLE,
    goals,
    goals_table,
)
from bench.gpu.scales import FULL


def empty(**parts: Any) -> dict[str, Any]:
    lists = ("kernels", "decode", "prefill", "steady", "end_to_end", "cold_start", "models")
    return {"ceilings": None, "first_token": None, **{name: [] for name in lists}} | parts


def row_of(name: str, figures: dict[str, Any]) -> tuple[str, str]:
    """What the goal's line says was measured, and whether it was met."""
    (line,) = [line for line in goals_table(figures).splitlines() if f"| {name} |" in line]
    _, _, _, measured, met, _ = line.split("|")
    return measured.strip(), met.strip()


def steady(batch: int, ratio: float = 0.9, idle: float | None = 0.005) -> dict[str, Any]:
    row = {"model": MODEL, "batch": batch, "context": 1024, "ratio": ratio, "tokens_per_s": 250.0}
    return row if idle is None else row | {"idle": idle}


def end(by: str, workload: str, rate: float, **others: Any) -> dict[str, Any]:
    row = {"model": MODEL, "by": by, "workload": workload, "tokens_per_s": rate}
    return row | {"finished": True, "ratio": 0.8} | others


def test_of_a_run_that_measured_nothing_every_goal_says_so() -> None:
    lines = goals_table(empty()).splitlines()[2:]
    assert len(lines) == len(goals()) == 18
    assert all(line.endswith("| not measured | - |") for line in lines)


@pytest.mark.parametrize(("ratio", "met"), [(0.86, "yes"), (0.84, "no")])
def test_decode_is_the_whole_engine_s(ratio: float, met: str) -> None:
    steps = {"model": MODEL, "batch": 1, "context": 1024, "ratio": 0.91, "in_graph": True}
    found = row_of("decode, batch 1 x 1k", empty(steady=[steady(1, ratio)], decode=[steps]))
    assert found == (f"{ratio:.1%}, 250 tokens/s (its steps alone 91.0%)", met)


def test_steps_alone_do_not_answer_for_the_engine() -> None:
    steps = {"model": MODEL, "batch": 32, "context": 1024, "ratio": 0.91, "in_graph": True}
    found = row_of("decode, batch 32 x 1k", empty(decode=[steps]))
    assert found == ("engine: not measured, its steps alone 91.0%", "-")


def test_the_device_is_idle_as_much_as_at_its_worst_batch() -> None:
    name = "GPU idle between decode steps"
    rows = [steady(1), steady(32), steady(256, idle=0.011)]
    assert row_of(name, empty(steady=rows)) == ("0.5% at 1, 0.5% at 32, 1.1% at 256", "no")
    assert row_of(name, empty(steady=[*rows[:2], steady(256)]))[1] == "yes"
    assert row_of(name, empty(steady=rows[:2]))[1] == "-", "all batches have to be measured"
    assert row_of(name, empty(steady=[steady(1, idle=None)])) == ("not measured", "-")


def test_attention_is_beside_a_copy_and_prefill_beside_a_gemm() -> None:
    ceilings = {"copy_gb_per_s": 4000.0, "gb_per_s": 4400.0, "tflops": 800.0}
    kernel = {"kernel": "decode attention", "batch": 32, "context": 4096, "gb_per_s": 3440.0}
    prompt = {"model": MODEL, "batch": 1, "tokens": 8192, "before": 0, "steps": 2, "tflops": 512.0}
    figures = empty(ceilings=ceilings, kernels=[kernel], prefill=[prompt])
    assert row_of("decode attention, 32 x 4k", figures) == ("86.0%, 3,440 GB/s", "yes")
    assert row_of("prefill of 8k tokens", figures) == ("64.0%, 512 TFLOP/s in 2 steps", "no")


def test_http_is_beside_offline_and_the_engine_beside_its_peers() -> None:
    rows = [
        end("engine", WHOLE, 10_000.0),
        end("http", WHOLE, 9_800.0),
        end("engine", PEER, 8_000.0),
        end("continuous", PEER, 1_250.0),
        end("engine", SINGLE, 240.0),
        end("generate", SINGLE, 30.0),
    ]
    figures = empty(end_to_end=rows)
    offline = row_of("1000 in, 1000 out, 256 offline", figures)
    assert offline == ("80.0%, 10,000 tokens/s", "yes")
    http = row_of("the same over HTTP, 256 streams", figures)
    assert http == ("98.0%, 9,800 tokens/s", "yes")
    peer = row_of("transformers' continuous batching, sdpa", figures)
    assert peer == ("6.4 times (8,000, 1,250)", "no")
    assert row_of("transformers' generate, batch 1", figures) == ("8.0 times (240, 30)", "yes")


def test_what_was_cut_short_answers_nothing() -> None:
    rows = [
        end("engine", PEER, 8_000.0),
        end("continuous", PEER, 0.0, finished=False),
    ]
    name = "transformers' continuous batching, sdpa"
    assert row_of(name, empty(end_to_end=rows)) == ("it finished no request in its time", "-")
    rows[1] = end("continuous", PEER, 500.0, finished=False)
    assert row_of(name, empty(end_to_end=rows)) == ("16.0 times (8,000, 500), cut short", "-")


def test_a_cached_prompt_and_a_warm_start_are_held_against_their_times() -> None:
    first = {"model": MODEL, "tokens": 32768, "cached_ms": 9.4, "cached_host_ms": 4.0}
    start = {"model": MODEL, "first_token_s": 11.0, "prepared_s": 13.5}
    figures = empty(first_token=first | {"cold_ms": 1500.0}, cold_start=[start | {"start": 1}])
    token = row_of("first token of a cached 32k prompt", figures)
    assert token == ("9.4 ms, 4.0 until it was launched (cold 1,500)", "yes")
    name = "process start to first token"
    assert row_of(name, figures) == ("11.0 s, kernels to be compiled", "-")
    figures["cold_start"].append(start | {"start": 2})
    assert row_of(name, figures) == ("11.0 s", "yes")
    assert row_of("process start to every graph", figures) == ("13.5 s", "no")


def test_other_models_have_to_run_from_graphs() -> None:
    rows = [
        {"model": "gpt2-xl", "batch": batch, "context": 1011, "ratio": 0.8, "in_graph": True}
        for batch in (1, 32, 256)
    ]
    name, models = "gpt2-xl: decode in full graphs", [{"model": "gpt2-xl", "graphs": 6}]
    found = row_of(name, empty(decode=rows, models=models))
    assert found == ("6 graphs; 80% at 1, 80% at 32, 80% at 256 of its bound", "yes")
    assert row_of(name, empty(decode=rows[:2], models=models))[1] == "-"
    rows[1]["in_graph"] = False
    measured, met = row_of(name, empty(decode=rows, models=models))
    assert measured.startswith("no graph at 32; ")
    assert met == "no"


def test_the_full_scale_measures_every_goal() -> None:
    assert FULL.model == MODEL
    assert FULL.others == OTHERS
    assert set(FULL.steady) == {(batch, CONTEXT) for batch in BATCHES}
    assert set(BATCHES) <= set(FULL.points.batches)
    assert set(BATCHES) <= set(FULL.other_points.batches)
    assert CONTEXT in FULL.points.contexts
    batch, context = ATTENTION
    assert batch in FULL.kernel_batches
    assert context in FULL.kernel_contexts
    assert (1, PROMPT_TOKENS, 0) in FULL.points.prompts
    assert FULL.http.name == WHOLE
    assert WHOLE in [workload.name for workload in FULL.offline]
    assert (FULL.peer.name, FULL.single.name) == (PEER, SINGLE)
    assert FULL.cached_prompt == CACHED_TOKENS
    assert FULL.starts > 1
