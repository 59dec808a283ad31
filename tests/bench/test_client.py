"""The client against scripted servers: what it counts, and what it calls a failure."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import orjson
import pytest
import uvloop

from bench.load import LoadResult, run_load
from tests.bench.test_workload import plan

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
    """Make an answer with the requested tokens, and one prompt token more than words, for BOS."""
    parameters, inputs = body["parameters"], body["inputs"]
    assert isinstance(parameters, dict)
    assert isinstance(inputs, str)
    num_tokens = parameters["max_new_tokens"]
    tokens = [tgi_token(index) for index in range(1, num_tokens)]
    return [*tokens, tgi_final(num_tokens, len(inputs.split()) + 1)]


def first(*scripts: Sequence[Step]) -> Answer:
    """Give these answers in turn, and good ones after them."""
    remaining = iter(scripts)
    return lambda body: next(remaining, None) or tgi_events(body)


def always(steps: Sequence[Step]) -> Answer:
    return lambda _: steps


def load(answer: Answer, **changes: object) -> tuple[LoadResult, Server]:
    async def run() -> tuple[LoadResult, Server]:
        async with serving(answer) as server:
            return await run_load(server.url, plan(**changes)), server

    return uvloop.run(run())


def one_failure(steps: Sequence[Step], **changes: object) -> str:
    """Return the error of a single request that gets this answer."""
    result, _ = load(always(steps), num_requests=1, **changes)
    assert (result.summary.completed, result.summary.failed) == (0, 1)
    return result.summary.errors[0][0]


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


def test_eos_before_the_length_is_counted_as_it_came() -> None:
    result, _ = load(always([tgi_token(1), tgi_final(2, 9)]))
    assert result.summary.total_output_tokens == 12
    assert result.summary.num_stopped_early == 6


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
    assert "not a JSON object" in one_failure([b"data: {nonsense\n\n"])


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
