"""/v1/completions with one prompt and several, streamed or not, to the byte; /v1/models."""

import time
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest

from engine.core.request import (
    Event,
    Failed,
    FinishReason,
    Request,
    SamplingParams,
    TokenOutput,
)
from tests.api.client import Connection, client, make_app, until
from tests.api.scripted import HOLD, ScriptedEngine, finished, output, token

pytestmark = pytest.mark.anyio

PATH = "/v1/completions"
HEAD = b'{"object":"text_completion","id":"","created":1700000000,'
MODEL = b'"model":"org/model","system_fingerprint":"3.3.6-dev0-native"'
DONE = b"data: [DONE]\n\n"


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1700000000.5)


async def ask(engine: ScriptedEngine | None = None, **body: Any) -> httpx2.Response:
    async with client(engine or ScriptedEngine()) as http:
        return await http.post(PATH, json={"prompt": "Say hello"} | body)


async def asked(**body: Any) -> Request:
    engine = ScriptedEngine()
    answer = await ask(engine, **body)
    assert answer.status_code == 200, answer.text
    return engine.requests[0]


def usage(prompt: int, completion: int) -> bytes:
    return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
        prompt,
        completion,
        prompt + completion,
    )


def choice(text: bytes, reason: bytes, index: int = 0) -> bytes:
    return b'[{"index":%d,"text":"%b","logprobs":null,"finish_reason":"%b"}]' % (
        index,
        text,
        reason,
    )


def chunk(text: bytes, index: int = 0) -> bytes:
    choices = b'"choices":' + choice(text, b"", index)
    return b"data: " + HEAD + choices + b"," + MODEL + b"}\n\n"


def last(text: bytes, reason: bytes, counted: bytes, index: int = 0) -> bytes:
    choices = b',"choices":' + choice(text, reason, index)
    return b"data: " + HEAD + MODEL + choices + b',"usage":' + counted + b"}\n\n"


def echo(request: Request) -> Sequence[list[Event]]:
    """Generate as many tokens as the prompt has, each with that number in its text."""
    count = len(request.prompt_ids)
    steps: list[list[Event]] = [[output(f"a{count}")] for _ in range(count - 1)]
    return [*steps, [output(f"b{count}"), finished(f"t{count}", count)]]


async def test_an_answer_is_tgis_to_the_byte() -> None:
    answer = await ask()
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    choices = b',"choices":' + choice(b" Hello you", b"length")
    assert answer.content == HEAD + MODEL + choices + b',"usage":' + usage(3, 2) + b"}"


@pytest.mark.parametrize(
    ("reason", "told"),
    [(FinishReason.EOS_TOKEN, "stop"), (FinishReason.STOP_SEQUENCE, "stop_sequence")],
)
async def test_finish_reasons_are_tgis(reason: FinishReason, told: str) -> None:
    engine = ScriptedEngine(lambda _: [[output("a"), finished("a", 1, reason)]])
    assert (await ask(engine)).json()["choices"][0]["finish_reason"] == told


async def test_each_of_several_prompts_has_its_choice_and_usage_is_summed() -> None:
    answer = await ask(ScriptedEngine(echo), prompt=["a b c", "a"])
    told = answer.json()
    assert [(c["index"], c["text"]) for c in told["choices"]] == [(0, "t4"), (1, "t2")]
    assert told["usage"] == {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12}


async def test_headers_are_sums_without_the_compute_time() -> None:
    answer = await ask(ScriptedEngine(echo), prompt=["a b c", "a"])
    headers = {name: value for name, value in answer.headers.items() if name.startswith("x-")}
    assert int(headers.pop("x-total-time")) >= int(headers.pop("x-validation-time")) >= 0
    assert headers == {
        "x-compute-type": "1-nvidia-h200",
        "x-compute-characters": "6",
        "x-queue-time": "500",
        "x-inference-time": "1000",
        "x-time-per-token": "375",
        "x-prompt-tokens": "6",
        "x-generated-tokens": "6",
    }


async def test_the_model_is_the_served_one_whatever_was_asked_for() -> None:
    assert (await ask(model="gpt-4o")).json()["model"] == "org/model"


async def test_parameters_reach_the_engine() -> None:
    request = await asked(
        temperature=0.5,
        top_p=0.5,
        frequency_penalty=0.25,
        presence_penalty=1.5,
        repetition_penalty=1.25,
        seed=7,
        stop="a",
        max_completion_tokens=9,
        ignore_eos=True,
    )
    assert request.sampling == SamplingParams(
        do_sample=True,
        temperature=0.5,
        top_p=0.5,
        frequency_penalty=0.25,
        presence_penalty=1.5,
        repetition_penalty=1.25,
        seed=7,
    )
    assert request.stopping.stop == ("a",)
    assert request.stopping.max_new_tokens == 9
    assert request.stopping.ignore_eos
    assert len(request.prompt_ids) == 3  # one special token in front


async def test_a_temperature_of_zero_is_greedy() -> None:
    assert not (await asked(temperature=0, top_p=1)).sampling.do_sample


async def test_null_equals_absent_and_unknown_fields_are_ignored() -> None:
    names = (
        "model max_tokens temperature top_p stream seed suffix stop stream_options best_of "
        "repetition_penalty frequency_penalty presence_penalty echo logprobs n user logit_bias"
    )
    assert (await ask(**dict.fromkeys(names.split()))).content == (await ask()).content
    assert (await ask(n=2, echo=True, logprobs=1, best_of=3)).content == (await ask()).content


REFUSED = [
    (
        {"suffix": ""},
        "Suffix is not supported and can be achieved by preprocessing the prompt.",
        "suffix not supported",
    ),
    (
        {"prompt": ["x"] * 5},
        "Number of prompts exceeds the maximum allowed batch size of 4",
        "batch size exceeded",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "error", "error_type"), REFUSED)
async def test_suffixes_and_too_many_prompts_are_refused_first(
    body: dict[str, Any], error: str, error_type: str, stream: bool
) -> None:
    answer = await ask(ScriptedEngine(permits=0), stream=stream, **body)
    assert answer.status_code == 422
    assert answer.json() == {"error": error, "error_type": error_type}


SHAPE = "Failed to deserialize the JSON body into the target type: "
NO_PROMPT = "prompt: data did not match any variant of untagged enum PromptDeserializer"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([], "prompt: Empty array detected. Do not use an empty array for the prompt."),
        ([1, 2], NO_PROMPT),
        ([[1, 2]], NO_PROMPT),
        (None, NO_PROMPT),
    ],
)
async def test_prompts_are_texts(prompt: object, text: str) -> None:
    answer = await ask(prompt=prompt)
    assert answer.status_code == 422
    assert answer.text.startswith(SHAPE + text)


async def test_one_prompt_that_fails_fails_all_and_ends_the_others() -> None:
    def script(request: Request) -> Sequence[list[Event]]:
        return [HOLD] if len(request.prompt_ids) > 2 else [[output("a")], [Failed("bad luck")]]

    engine = ScriptedEngine(script)
    answer = await ask(engine, prompt=["a b c", "a", "a b"])
    assert answer.status_code == 424
    assert engine.num_aborts == len(engine.requests) - 1


async def test_each_prompt_takes_a_permit() -> None:
    answer = await ask(ScriptedEngine(permits=1), prompt=["a", "b"])
    assert answer.status_code == 429
    assert answer.content == b'{"error":"Model is overloaded","error_type":"overloaded"}'


# Streams.


async def test_a_stream_is_tgis_to_the_byte() -> None:
    answer = await ask(stream=True)
    assert answer.content == chunk(b" Hello") + last(b" you", b"length", usage(3, 2)) + DONE
    assert dict(answer.headers) == {
        "content-type": "text/event-stream",
        "cache-control": "no-cache",
        "x-compute-type": "1-nvidia-h200",
        "x-compute-characters": "9",
        "x-accel-buffering": "no",
        "vary": "origin, access-control-request-method, access-control-request-headers",
        "access-control-allow-origin": "*",
    }


async def test_the_last_chunk_has_tgis_reason_and_the_text_of_a_special_token() -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        eos = TokenOutput(token(2, "</s>", special=True))
        return [[output("a")], [eos, finished("a", 2, FinishReason.EOS_TOKEN)]]

    answer = await ask(ScriptedEngine(script), stream=True)
    assert answer.content == chunk(b"a") + last(b"</s>", b"eos_token", usage(3, 2)) + DONE


def of_prompt(index: int, content: bytes) -> bytes:
    events = [event + b"\n\n" for event in content.split(b"\n\n")]
    return b"".join(event for event in events if b'"index":%d,' % index in event)


async def test_each_prompt_has_its_chunks_and_done_comes_once() -> None:
    answer = await ask(ScriptedEngine(echo), prompt=["a b", "a"], stream=True)
    assert of_prompt(0, answer.content) == (
        chunk(b"a3") + chunk(b"a3") + last(b"b3", b"length", usage(3, 3))
    )
    assert of_prompt(1, answer.content) == chunk(b"a2", 1) + last(b"b2", b"length", usage(2, 2), 1)
    assert answer.content.endswith(DONE)
    assert answer.content.count(b"data: ") == 6
    assert answer.headers["x-compute-characters"] == "4"


async def test_a_slow_prompt_does_not_delay_the_others() -> None:
    def script(request: Request) -> Sequence[list[Event]]:
        return echo(request) if len(request.prompt_ids) == 2 else [[output("a")], HOLD]

    engine = ScriptedEngine(script)
    body = {"prompt": ["a b", "a"], "stream": True}
    connection = Connection(make_app(engine), PATH, body)
    await until(lambda: b"b2" in connection.body())
    await connection.go_away()
    assert engine.num_aborts == 1


async def test_usage_of_all_prompts_comes_last_if_asked_for() -> None:
    options = {"include_usage": True}
    answer = await ask(
        ScriptedEngine(echo), prompt=["a b", "a"], stream=True, stream_options=options
    )
    counted = b',"choices":[],"usage":' + usage(5, 5) + b"}\n\n"
    assert answer.content.endswith(b"data: " + HEAD + MODEL + counted + DONE)


async def test_every_chunk_has_the_usage_so_far_if_asked_for() -> None:
    answer = await ask(stream=True, stream_options={"continuous_usage_stats": True})
    first = chunk(b" Hello").replace(b"}\n\n", b',"usage":' + usage(3, 1) + b"}\n\n")
    assert answer.content == first + last(b" you", b"length", usage(3, 2)) + DONE


def error(text: bytes) -> bytes:
    return b'data: {"error":{"message":"' + text + b'","http_status_code":422}}\n\n'


async def test_a_validation_error_is_an_event() -> None:
    answer = await ask(stream=True, prompt="", stream_options={"include_usage": True})
    assert answer.status_code == 200
    assert answer.content == error(b"Input validation error: `inputs` cannot be empty") + DONE


async def test_an_error_ends_the_part_of_its_own_prompt() -> None:
    def script(request: Request) -> Sequence[list[Event]]:
        return echo(request) if len(request.prompt_ids) > 2 else [[output("a"), Failed("no")]]

    answer = await ask(
        ScriptedEngine(script),
        prompt=["a b", "a"],
        stream=True,
        stream_options={"include_usage": True},
    )
    assert of_prompt(0, answer.content).endswith(last(b"b3", b"length", usage(3, 3)))
    assert of_prompt(1, answer.content) == chunk(b"a", 1)
    assert error(b"Request failed during generation: no") in answer.content
    assert answer.content.count(b"data: ") == 6


async def test_chunks_of_several_prompts_that_are_pending_are_sent_together() -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        return [[output("a"), output("b")], [output("c"), finished("abc", 3)]]

    connection = Connection(make_app(ScriptedEngine(script)), PATH, {"prompt": "x", "stream": True})
    await connection.finished()
    sizes = [message["body"].count(b"data: ") for message in connection.sent[1:]]
    assert sizes == [2, 1, 1, 0]


async def test_a_client_that_goes_away_ends_every_prompt() -> None:
    engine = ScriptedEngine(lambda _: [[output("a")], HOLD])
    body = {"prompt": ["x", "y", "z"], "stream": True}
    connection = Connection(make_app(engine), PATH, body)
    await until(lambda: connection.body().count(b"data: ") == 3)
    await connection.go_away()
    assert engine.num_aborts == 3


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_one_model_is_listed(method: str) -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.request(method, "/v1/models")
    assert answer.status_code == 200
    if method == "GET":
        assert answer.content == (
            b'{"object":"list","data":[{"id":"org/model","object":"model","created":0,'
            b'"owned_by":"org/model"}]}'
        )
