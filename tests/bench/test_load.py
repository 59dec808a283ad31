"""Whole runs against scripted servers: the requests, the loops, the figures, the command line."""

import asyncio
import math
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import orjson
import pytest
import uvloop

from bench.client import LoadError
from bench.load import main, run_load
from bench.report import (
    Latency,
    RequestRecord,
    Summary,
    ratios,
    summarise,
    summary_json,
    summary_table,
)
from bench.workload import LengthMix, arrivals
from tests.bench.test_client import (
    TOO_MANY,
    Answer,
    Body,
    Server,
    Step,
    always,
    load,
    serving,
    tgi_events,
)
from tests.bench.test_workload import plan

# Figures, from known timings.


def test_latency_interpolates_between_neighbours() -> None:
    latency = Latency.of([0.001, 0.002, 0.003, 0.010])
    assert latency.mean_ms == pytest.approx(4)
    assert latency.median_ms == latency.p50_ms == pytest.approx(2.5)
    assert latency.p99_ms == pytest.approx(3 + 0.97 * 7)


def test_latency_of_nothing_is_nan() -> None:
    assert math.isnan(Latency.of([]).p99_ms)


def test_summary_of_known_timings() -> None:
    records = [
        RequestRecord(10.0, [10.5, 10.7, 11.1], 7, 3, 3, counted_by_server=True),
        RequestRecord(11.0, [11.1], 5, 1, 4),
        RequestRecord(11.0, [11.2], 5, 1, 4, error="lost"),
    ]
    summary = summarise(records, duration_s=2.0, client_cpu_s=0.001)
    assert (summary.completed, summary.failed, summary.errors) == (2, 1, (("lost", 1),))
    assert (summary.total_input_tokens, summary.total_output_tokens) == (12, 4)
    assert (summary.num_stopped_early, summary.num_counted_by_client) == (1, 1)
    assert summary.request_throughput == 1
    assert summary.output_throughput == 2
    assert summary.total_token_throughput == 8
    assert summary.ttft.mean_ms == pytest.approx(300)
    assert summary.tpot.mean_ms == pytest.approx(300)  # of the first alone: 0.6 s over 2 tokens
    assert summary.itl.median_ms == pytest.approx(300)  # of 200 and 400
    assert summary.e2el.mean_ms == pytest.approx(600)
    assert summary.client_cpu_s_per_1000_events == pytest.approx(0.2)  # failed ones cost too
    assert summary_json(summary)["median_ttft_ms"] == pytest.approx(300)
    assert "1 x lost" in summary_table(summary)


def test_table_shows_the_first_few_kinds_of_failure() -> None:
    records = [RequestRecord(0.0, [], 1, 0, 1, error=f"fault {n}") for n in range(7)]
    table = summary_table(summarise(records, 1.0, 0.0))
    assert "1 x fault 4\nand 2 other kinds of failure" in table


def test_ratio_is_of_medians_with_the_rounds_extremes() -> None:
    def summary(ttft_s: float) -> Summary:
        return summarise([RequestRecord(0.0, [ttft_s, 2 * ttft_s], 1, 2, 2)], 1.0, 0.0)

    pairs = [(summary(a), summary(b)) for a, b in ((1, 2), (2, 2), (6, 3))]
    ratio = ratios(pairs)["median TTFT ms"]
    assert (ratio.of_medians, ratio.low, ratio.high) == (1, 0.5, 2)


def test_ratio_to_a_server_that_only_failed_is_nan() -> None:
    good = summarise([RequestRecord(0.0, [1.0, 2.0], 1, 2, 2)], 1.0, 0.0)
    bad = summarise([RequestRecord(0.0, [], 1, 0, 2, error="lost")], 1.0, 0.0)
    assert math.isnan(ratios([(good, bad), (good, good)])["median TPOT ms"].of_medians)


# The requests and the loops.


def test_a_seed_makes_the_same_requests_again() -> None:
    _, once = load(tgi_events, seed=1, input_len=LengthMix.parse("1:9"))
    _, again = load(tgi_events, seed=1, input_len=LengthMix.parse("1:9"), warmup=1)
    _, other = load(tgi_events, seed=2, input_len=LengthMix.parse("1:9"))
    assert once.bodies == again.bodies[1:]
    assert once.bodies != other.bodies


def test_shared_prefix_is_the_fractions_and_lengthens_all() -> None:
    def openings(fraction: float) -> list[str]:
        changes = {"shared_prefix_len": 5, "shared_fraction": fraction, "num_requests": 20}
        _, server = load(tgi_events, **changes)
        words = [str(body["inputs"]).split() for body in server.bodies]
        assert {len(each) for each in words} == {13}
        return [" ".join(each[:5]) for each in words]

    assert len(set(openings(1.0))) == 1
    assert len(set(openings(0.0))) == 20
    half = openings(0.5)
    assert 4 <= max(half.count(opening) for opening in half) <= 16


def test_closed_loop_keeps_one_connection_per_slot() -> None:
    result, server = load(lambda body: [0.005, *tgi_events(body)], num_requests=12, concurrency=3)
    assert result.summary.completed == 12
    assert (server.num_connections, server.most_running) == (3, 3)


def test_open_loop_sends_without_waiting_for_answers() -> None:
    def answer(body: Body) -> Sequence[Step]:
        return [0.2, *tgi_events(body)]

    result, server = load(answer, rate=200.0, num_requests=10)
    expected = list(arrivals(plan(rate=200.0, num_requests=10)))
    starts = [record.start_s for record in result.records]
    assert result.summary.completed == 10
    assert server.num_connections == 10
    assert starts[-1] - starts[0] == pytest.approx(expected[-1] - expected[0], abs=0.05)


def test_server_that_is_not_there_is_an_error_of_the_run() -> None:
    with pytest.raises(LoadError, match=r"cannot reach 127\.0\.0\.1:9"):
        uvloop.run(run_load("http://127.0.0.1:9", plan()))


def test_failed_warmup_is_an_error_of_the_run() -> None:
    with pytest.raises(LoadError, match="warm-up request failed: HTTP 429"):
        load(always([TOO_MANY]), warmup=1)


# The command line.


def run_main(*flags: str, answers: Sequence[Answer]) -> tuple[int, list[Server]]:
    """`main` in a thread, against one server per answer; `{0}` in a flag is the first's URL."""

    async def run() -> tuple[int, list[Server]]:
        async with AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(serving(answer)) for answer in answers]
            urls = [server.url for server in servers]
            return await asyncio.to_thread(main, [flag.format(*urls) for flag in flags]), servers

    return asyncio.run(run())


SMALL = ("--concurrency", "2", "--num-requests", "4", "--input-len", "8", "--output-len", "4")


def test_main_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    code, _ = run_main("--url", "{0}", *SMALL, "--json", str(path), answers=[tgi_events])
    table, written = capsys.readouterr().out, orjson.loads(path.read_bytes())
    assert code == 0
    assert "Successful requests:                    4\n" in table
    assert "CPU seconds per 1000 events:" in table
    assert (written["completed"], written["total_output_tokens"]) == (4, 16)
    assert (written["config"]["api"], written["config"]["output_len"]) == ("tgi", "4")
    assert [len(gaps) for gaps in written["itls"]] == [3] * 4


def test_main_fails_where_a_request_did(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = run_main("--url", "{0}", *SMALL, answers=[always([TOO_MANY])])
    assert code == 1
    assert "4 x HTTP 429: overloaded" in capsys.readouterr().out


def test_main_says_what_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, complaint in (
        (["--input-len", "x"], "write 128, or 64:256"),
        (["--url", "localhost:8080"], "write it as http://127.0.0.1:8080"),
        (["--rate", "1"], "not allowed with argument --concurrency"),
    ):
        with pytest.raises(SystemExit):
            main(["--url", "http://127.0.0.1:9", *SMALL, *flags])
        assert complaint in capsys.readouterr().err


def test_versus_alternates_the_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    visits: list[str] = []

    def answer_of(name: str, delay_s: float) -> Answer:
        def answer(body: Body) -> Sequence[Step]:
            visits.append(name)
            return [delay_s, *tgi_events(body)]

        return answer

    path = tmp_path / "versus.json"
    flags = ("--url", "{0}", "--vs", "{1}", "--rounds", "3", *SMALL, "--json", str(path))
    code, (a, b) = run_main(*flags, answers=[answer_of("A", 0.04), answer_of("B", 0.01)])
    assert code == 0
    assert visits == (["A"] * 4 + ["B"] * 4) * 3
    inputs_a, inputs_b = ({str(body["inputs"]) for body in server.bodies} for server in (a, b))
    assert inputs_a == inputs_b
    assert len(inputs_a) == 12
    ratios_written = orjson.loads(path.read_bytes())["ratios"]
    assert ratios_written["median TTFT ms"]["of_medians"] > 1.5
    assert "A/B output tok/s: 0." in capsys.readouterr().out
