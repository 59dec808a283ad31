"""The load generator against scripted servers: what it counts, and what it calls a failure."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import orjson
import pytest
import uvloop

from bench.load import LengthMix, LoadError, LoadPlan, LoadResult, arrivals, main, run_load
from bench.report import (
    Latency,
    RequestRecord,
    Summary,
    ratios,
    summarise,
    summary_json,
    summary_table,
)

Step = bytes | float
"""Bytes to write as one chunk, or seconds to wait."""

CUT = -1.0
"""A step: close the connection in the middle of the answer."""

Body = dict[str, object]
Answer = Callable[[Body], Sequence[Step]]

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Raw(bytes):
    """The only step of an answer, written as it is: without our head and chunks."""


TOO_MANY = Raw(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 10\r\n\r\noverloaded")
NOT_HTTP = Raw(b"SSH-2.0\r\n")


@dataclass
class Server:
    """Answers each request by its script; remembers bodies, connections and paths."""

    answer: Answer
    url: str = ""
    bodies: list[Body] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    num_connections: int = 0
    num_running: int = 0
    most_running: int = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
        body = orjson.loads(await reader.readexactly(length))
        self.paths.append(head.split()[1])
        self.bodies.append(body)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        is_kept = await self._play(self.answer(body), writer)
        self.num_running -= 1
        return is_kept

    async def _play(self, steps: Sequence[Step], writer: asyncio.StreamWriter) -> bool:
        if isinstance(steps[0], Raw):
            writer.write(steps[0])
            return True
        writer.write(HEAD)
        for step in steps:
            if step == CUT:
                return False
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                writer.write(b"%x\r\n%b\r\n" % (len(step), step))
        writer.write(b"0\r\n\r\n")
        return True


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Server]:
    server = Server(answer)
    async with await asyncio.start_server(server.handle, "127.0.0.1", 0) as listener:
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        yield server


def event(content: object) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


def tgi_token(index: int) -> bytes:
    return event({"index": index, "token": {"text": "data:"}, "generated_text": None})


def tgi_final(index: int, input_length: int) -> bytes:
    details = {"generated_tokens": index, "input_length": input_length}
    return event({"index": index, "token": {}, "generated_text": "x", "details": details})


def tgi_events(body: Body) -> list[bytes]:
    """As many tokens as asked, and one prompt token more than words, as for a BOS token."""
    parameters, inputs = body["parameters"], body["inputs"]
    assert isinstance(parameters, dict)
    assert isinstance(inputs, str)
    num_tokens = parameters["max_new_tokens"]
    tokens = [tgi_token(index) for index in range(1, num_tokens)]
    return [*tokens, tgi_final(num_tokens, len(inputs.split()) + 1)]


def first(*scripts: Sequence[Step]) -> Answer:
    """These answers in turn, and good ones after them."""
    remaining = iter(scripts)
    return lambda body: next(remaining, None) or tgi_events(body)


def always(steps: Sequence[Step]) -> Answer:
    return lambda _: steps


def plan(**changes: object) -> LoadPlan:
    values: dict[str, object] = {
        "api": "tgi",
        "num_requests": 6,
        "input_len": LengthMix.parse("8"),
        "output_len": LengthMix.parse("4"),
    }
    if "rate" not in changes:
        values["concurrency"] = 1
    return LoadPlan(**values | changes)  # type: ignore[arg-type]


def load(answer: Answer, **changes: object) -> tuple[LoadResult, Server]:
    async def run() -> tuple[LoadResult, Server]:
        async with serving(answer) as server:
            return await run_load(server.url, plan(**changes)), server

    return uvloop.run(run())


def one_failure(steps: Sequence[Step], **changes: object) -> str:
    """The error of a single request that is answered so."""
    result, _ = load(always(steps), num_requests=1, **changes)
    assert (result.summary.completed, result.summary.failed) == (0, 1)
    return result.summary.errors[0][0]


# Lengths and arrivals.


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("128", ((1.0, 128, 128),)),
        ("64:256", ((1.0, 64, 256),)),
        ("0.7*32:64+0.3*512", ((0.7, 32, 64), (0.3, 512, 512))),
    ],
)
def test_length_mix_parses(text: str, ranges: tuple[tuple[float, int, int], ...]) -> None:
    assert LengthMix.parse(text).ranges == ranges


@pytest.mark.parametrize(
    "text", ["", "x", "0", "9:3", "-4", "1:2:3", "0.7*32", "0.7*32+0.7*64", "nan*3", "1.5", "8+8"]
)
def test_length_mix_error_says_what_to_write(text: str) -> None:
    with pytest.raises(ValueError, match=r"write 128, or 64:256 .* or 0\.7\*32:64\+0\.3\*512"):
        LengthMix.parse(text)


def test_length_mix_samples_every_range_by_its_weight() -> None:
    mix, rng = LengthMix.parse("0.7*1:3+0.3*512"), Random(0)
    lengths = [mix.sample(rng) for _ in range(2000)]
    assert set(lengths) == {1, 2, 3, 512}
    assert lengths.count(512) / len(lengths) == pytest.approx(0.3, abs=0.05)


def test_arrivals_are_the_seeds_and_come_at_the_rate() -> None:
    once = list(arrivals(plan(rate=50.0, num_requests=4000, seed=3)))
    assert once == list(arrivals(plan(rate=50.0, num_requests=4000, seed=3)))
    assert once == sorted(once)
    assert once != list(arrivals(plan(rate=50.0, num_requests=4000, seed=4)))
    assert once[-1] == pytest.approx(80, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"api": "grpc"}, "tgi, completions, chat"),
        ({"concurrency": None}, "one of concurrency, rate"),
        ({"rate": 1.0, "concurrency": 1}, "one of concurrency, rate"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"shared_fraction": 1.5}, "between 0 and 1"),
    ],
)
def test_plan_refuses_what_cannot_be(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        plan(**changes)


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


# TGI's wire.


def test_tgi_counts_what_the_server_tells() -> None:
    result, server = load(tgi_events, warmup=2, concurrency=2)
    summary = result.summary
    assert (summary.completed, summary.failed) == (6, 0)
    assert summary.total_input_tokens == 6 * 9
    assert summary.total_output_tokens == summary.num_events == 6 * 4
    assert (summary.num_stopped_early, summary.num_counted_by_client) == (0, 0)
    assert server.paths == ["/generate_stream"] * 8
    assert server.bodies[0]["parameters"] == {"max_new_tokens": 4, "details": True}
    assert len({str(body["inputs"]) for body in server.bodies}) == 8


def test_tgi_samples_with_a_temperature() -> None:
    _, server = load(tgi_events, num_requests=1, temperature=0.5)
    parameters = server.bodies[0]["parameters"]
    assert isinstance(parameters, dict)
    assert (parameters["do_sample"], parameters["temperature"]) == (True, 0.5)


def test_a_seed_makes_the_same_requests_again() -> None:
    _, once = load(tgi_events, seed=1, input_len=LengthMix.parse("1:9"))
    _, again = load(tgi_events, seed=1, input_len=LengthMix.parse("1:9"), warmup=1)
    _, other = load(tgi_events, seed=2, input_len=LengthMix.parse("1:9"))
    assert once.bodies == again.bodies[1:]
    assert once.bodies != other.bodies


def test_eos_before_the_length_is_counted_as_it_came() -> None:
    result, _ = load(always([tgi_token(1), tgi_final(2, 9)]))
    assert result.summary.total_output_tokens == 12
    assert result.summary.num_stopped_early == 6


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


def test_events_in_one_read_have_no_time_between_them() -> None:
    def answer(body: Body) -> Sequence[Step]:
        one, two, three, four = tgi_events(body)
        return [one + two, 0.03, three, 0.03, four]

    result, _ = load(answer, num_requests=1)
    (record,) = result.records
    assert record.itls_s[0] == 0
    assert min(record.itls_s[1:]) > 0.02
    assert record.output_tokens == 4


def test_events_cut_anywhere_are_put_together() -> None:
    def answer(body: Body) -> Sequence[Step]:
        whole = b":\n\n" + b"".join(tgi_events(body))
        cuts = [whole[start : start + 7] for start in range(0, len(whole), 7)]
        return [cuts[0], 0.001, *cuts[1:9], 0.001, *cuts[9:]]

    result, _ = load(answer, num_requests=1)
    assert result.summary.completed == 1
    assert result.summary.num_events == 4


def test_error_event_in_the_middle_fails_the_request() -> None:
    error = event({"error": "Request failed during generation", "error_type": "generation"})
    assert "Request failed" in one_failure([tgi_token(1), error])
    assert "Request failed" in one_failure([tgi_token(1), error, tgi_final(2, 9)])
    assert "Request failed" in one_failure([tgi_token(1), error, CUT])


def test_cut_connection_fails_one_request_and_a_new_one_is_made() -> None:
    result, server = load(first([tgi_token(1), 0.01, CUT]))
    assert (result.summary.completed, result.summary.failed) == (5, 1)
    assert result.summary.errors == (("connection closed before the end", 1),)
    assert server.num_connections == 2


def test_stream_without_a_final_event_fails() -> None:
    assert one_failure([tgi_token(1), tgi_token(2)]) == "no final event"
    assert one_failure([b":\n\n"]) == "no final event"
    assert "no JSON object" in one_failure([b"data: {nonsense\n\n"])


def test_refusal_is_counted_with_its_status_and_keeps_the_connection() -> None:
    result, server = load(first([TOO_MANY], [TOO_MANY]))
    assert (result.summary.completed, result.summary.failed) == (4, 2)
    assert result.summary.errors == (("HTTP 429: overloaded", 2),)
    assert server.num_connections == 1


def test_answer_that_is_not_http_fails() -> None:
    result, server = load(first([NOT_HTTP]))
    ((error, count),) = result.summary.errors
    assert error.startswith("not an HTTP answer")
    assert (count, result.summary.completed, server.num_connections) == (1, 5, 2)


def test_hanging_stream_fails_after_the_timeout() -> None:
    assert "within 0.05 s" in one_failure([tgi_token(1), 0.2, CUT], timeout_s=0.05)


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


# OpenAI's wire.


def chunk(text: str, **more: object) -> bytes:
    return event({"choices": [{"index": 0, "text": text}], **more})


def chat_chunk(content: str, **more: object) -> bytes:
    return event({"choices": [{"delta": {"role": "assistant", "content": content}}], **more})


USAGE = {"prompt_tokens": 11, "completion_tokens": 3}
DONE = b"data: [DONE]\n\n"


def test_completions_usage_comes_with_tgis_last_token() -> None:
    steps = [chunk("a"), chunk("b"), chunk("c", usage=USAGE), DONE]
    result, server = load(always(steps), api="completions", num_requests=1)
    assert (result.summary.total_input_tokens, result.summary.total_output_tokens) == (11, 3)
    assert result.summary.num_events == 3
    assert server.paths == ["/v1/completions"]
    assert server.bodies[0]["temperature"] == 0
    assert isinstance(server.bodies[0]["prompt"], str)


def test_chat_usage_chunk_is_no_token() -> None:
    usage = event({"choices": [], "usage": USAGE})
    # The first token is half a character: no text yet, and still a token.
    steps: list[Step] = [chat_chunk(""), 0.03, chat_chunk("b"), chat_chunk("c"), 0.03, usage, DONE]
    result, server = load(always(steps), api="chat", num_requests=1)
    assert result.summary.num_events == 3
    assert result.summary.itl.p99_ms > 20
    assert result.records[0].itls_s[-1] < 0.02
    assert server.bodies[0]["stream_options"] == {"include_usage": True}


def test_chat_role_chunk_of_other_servers_is_no_token() -> None:
    usage = event({"choices": [], "usage": USAGE})
    tokens = [chat_chunk("a"), chat_chunk("b"), chat_chunk("c")]
    steps: list[Step] = [chat_chunk(""), 0.05, *tokens, usage, DONE]
    result, _ = load(always(steps), api="chat", num_requests=1)
    assert result.summary.num_events == 3
    assert result.summary.ttft.p50_ms > 40


def test_openai_without_usage_is_counted_by_the_client() -> None:
    result, _ = load(always([chunk("a"), chunk("b"), DONE]), api="completions")
    assert result.summary.total_input_tokens == 6 * 8
    assert result.summary.total_output_tokens == 6 * 2
    assert result.summary.num_counted_by_client == 6


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        ([chunk("a")], "no final event"),
        ([DONE], "no final event"),
        ([event({"choices": [], "usage": USAGE}), DONE], "no token"),
        ([chunk("a"), event({"error": {"message": "overloaded"}}), DONE], "overloaded"),
    ],
)
def test_openai_stream_that_is_not_whole_fails(steps: list[Step], complaint: str) -> None:
    assert complaint in one_failure(steps, api="completions")


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
