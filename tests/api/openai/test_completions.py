"""/v1/completions with one prompt and several, streamed or not, to the byte; /v1/models."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from api.openai.completion_choice import text_offsets
from engine.core.request import (
    Event,
    Failed,
    FinishReason,
    ReachedStop,
    Request,
    SamplingParams,
    TokenOutput,
)
from tests.api.client import Connection, client, make_app, until
from tests.api.scripted import HOLD, Script, ScriptedEngine, finished, output, token

pytestmark = pytest.mark.anyio

PATH = "/v1/completions"
HEAD = (
    b'{"id":"cmpl-1","object":"text_completion","created":1700000000,'
    b'"model":"org/model","system_fingerprint":"3.3.6-dev0-native"'
)
DONE = b"data: [DONE]\n\n"


@pytest.fixture(autouse=True)
def _clock_and_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1700000000.5)
    monkeypatch.setattr("api.openai.payloads.new_id", lambda prefix: f"{prefix}-1")


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


def choice(text: bytes, reason: bytes | None, index: int = 0) -> bytes:
    told = b"null" if reason is None else b'"' + reason + b'"'
    return b'[{"index":%d,"text":"%b","logprobs":null,"finish_reason":%b}]' % (index, text, told)


def chunk(text: bytes, reason: bytes | None = None, index: int = 0, counted: bytes = b"") -> bytes:
    told = b',"usage":' + counted if counted else b""
    return b"data: " + HEAD + b',"choices":' + choice(text, reason, index) + told + b"}\n\n"


def by_length(request: Request) -> Sequence[list[Event]]:
    """Generate as many tokens as the prompt has, each with that number in its text."""
    count = len(request.prompt_ids)
    steps: list[list[Event]] = [[output(f"a{count}")] for _ in range(count - 1)]
    return [*steps, [output(f"b{count}"), finished(f"t{count}", count)]]


async def test_an_answer_is_openais_to_the_byte() -> None:
    answer = await ask()
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    choices = b',"choices":' + choice(b" Hello you", b"length")
    assert answer.content == HEAD + choices + b',"usage":' + usage(3, 2) + b"}"


async def test_ids_are_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    ids = {(await ask()).json()["id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(id.startswith("cmpl-") for id in ids)


def at_stop(reason: FinishReason) -> Script:
    """Generate "a STOP" in two tokens, of which the second completes a stop string."""
    end = replace(finished("a STOP", 2, reason), stop=ReachedStop("STOP", "a "))
    return lambda _: [[output("a S")], [output("TOP"), end]]


FINISHES: list[tuple[Script, str]] = [
    (lambda _: [[output("a"), finished("a", 1, FinishReason.LENGTH)]], "length"),
    (lambda _: [[output("a"), finished("a", 1, FinishReason.EOS_TOKEN)]], "stop"),
    (at_stop(FinishReason.STOP_SEQUENCE), "stop"),
    (at_stop(FinishReason.LENGTH), "stop"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("script", "told"), FINISHES)
async def test_finish_reasons_are_openais(script: Script, told: str, stream: bool) -> None:
    answer = await ask(ScriptedEngine(script), stop="STOP", stream=stream)
    chunks = events(answer) if stream else [answer.json()]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [told]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_text_ends_before_the_stop_string(stream: bool) -> None:
    engine = ScriptedEngine(at_stop(FinishReason.STOP_SEQUENCE))
    answer = await ask(engine, stop=["STOP"], stream=stream)
    chunks = events(answer) if stream else [answer.json()]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "a "


async def test_each_of_several_prompts_has_its_choice_and_usage_is_summed() -> None:
    answer = await ask(ScriptedEngine(by_length), prompt=["a b c", "a"])
    told = answer.json()
    assert [(c["index"], c["text"]) for c in told["choices"]] == [(0, "t4"), (1, "t2")]
    assert told["usage"] == {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12}


async def test_headers_are_sums_without_the_compute_time() -> None:
    answer = await ask(ScriptedEngine(by_length), prompt=["a b c", "a"])
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
        logit_bias={"7": -100},
        seed=7,
        stop="a",
        max_completion_tokens=9,
        ignore_eos=True,
    )
    assert request.sampling == SamplingParams(
        do_sample=True,
        temperature=0.5,
        top_p=0.5,
        output_frequency_penalty=0.25,
        presence_penalty=1.5,
        repetition_penalty=1.25,
        logit_bias=((7, -100.0),),
        seed=7,
        raw_logprobs=True,
    )
    assert request.stopping.stop == ("a",)
    assert request.stopping.max_new_tokens == 9
    assert request.stopping.ignore_eos
    assert len(request.prompt_ids) == 3  # one special token in front


@pytest.mark.parametrize("greedy", [{"temperature": 0, "top_p": 1}, {"top_p": 0}])
async def test_a_temperature_or_top_p_of_zero_is_greedy(greedy: dict[str, float]) -> None:
    assert not (await asked(**greedy)).sampling.do_sample


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**64 - 1])
async def test_a_seed_is_any_64_bit_integer(seed: int) -> None:
    assert (await asked(seed=seed)).sampling.seed == seed % 2**64


async def test_null_equals_absent_and_fields_without_effect_are_ignored() -> None:
    names = (
        "model max_tokens temperature top_p stream seed suffix stop stream_options best_of "
        "repetition_penalty frequency_penalty presence_penalty echo logprobs n user logit_bias"
    )
    plain = (await ask()).content
    assert (await ask(**dict.fromkeys(names.split()))).content == plain
    ignored: dict[str, Any] = {
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
    }
    assert (await ask(suffix="", n=1, best_of=1, echo=False, **ignored)).content == plain


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"suffix": "!"}, "suffix", "unsupported_parameter"),
    ({"prompt": ["x"] * 5}, "prompt", None),
    ({"prompt": ""}, "prompt", None),
    ({"prompt": [[]]}, "prompt", None),
    ({"prompt": [5, 100]}, "prompt", None),
    ({"prompt": "w " * 2100}, "prompt", "context_length_exceeded"),
    ({"prompt": "w " * 1100, "max_tokens": 1000}, "prompt", "context_length_exceeded"),
    ({"prompt": [1] * 2100}, "prompt", "context_length_exceeded"),
    ({"n": 0}, "n", None),
    ({"n": 129}, "n", None),
    ({"best_of": 3}, "best_of", None),
    ({"n": 2, "best_of": 1}, "best_of", None),
    ({"best_of": 2, "stream": True}, "best_of", None),
    ({"logprobs": 6}, "logprobs", None),
    ({"top_p": 1.1}, "top_p", None),
    ({"top_p": -0.1}, "top_p", None),
    ({"temperature": -0.1}, "temperature", None),
    ({"frequency_penalty": 2.1}, "frequency_penalty", None),
    ({"presence_penalty": -2.1}, "presence_penalty", None),
    ({"logit_bias": {"100": 1}}, "logit_bias", None),
    ({"logit_bias": {"7": 100.5}}, "logit_bias", None),
    ({"stop": list("abcde")}, "stop", None),
    ({"stop": ["a", ""]}, "stop", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "param", "code"), REFUSED, ids=str)
async def test_what_cannot_be_served_is_a_400_that_names_the_field(
    body: dict[str, Any], param: str, code: str | None, stream: bool
) -> None:
    engine = ScriptedEngine()
    answer = await ask(engine, **{"stream": stream} | body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert error["message"]
    assert not engine.requests


async def test_the_options_of_a_stream_need_a_stream() -> None:
    answer = await ask(stream_options={"include_usage": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "stream_options"


SHAPE = "Failed to deserialize the JSON body into the target type: "
NO_PROMPT = "prompt: data did not match any variant of untagged enum PromptDeserializer"
EMPTY = "prompt: Empty array detected. Do not use an empty array for the prompt."


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"prompt": []}, "prompt", EMPTY),
        ({"prompt": [1, "a"]}, "prompt", NO_PROMPT),
        ({"prompt": ["a", [1]]}, "prompt", NO_PROMPT),
        ({"prompt": [1, -1]}, "prompt", NO_PROMPT),
        ({"prompt": [[1.0]]}, "prompt", NO_PROMPT),
        ({"prompt": None}, "prompt", NO_PROMPT),
        ({"n": "2"}, "n", 'n: invalid type: string "2", expected u32'),
        ({"seed": 2**64}, "seed", "seed: invalid value: integer"),
        ({"stop": ["a", 1]}, "stop[1]", "stop[1]: invalid type: integer `1`, expected a string"),
        ({"logit_bias": {"a": 1}}, "logit_bias", 'logit_bias: invalid value: string "a"'),
        ({"logit_bias": {"7": "1"}}, "logit_bias.7", 'logit_bias.7: invalid type: string "1"'),
        (
            {"logit_bias": {str(n): 0 for n in range(1025)}},
            "logit_bias",
            "logit_bias: invalid length 1025, expected at most 1024 tokens",
        ),
        ({"logit_bias": [1.0]}, "logit_bias", "logit_bias: invalid type: sequence"),
    ],
)
async def test_a_body_of_another_shape_is_a_400_that_names_the_field(
    body: dict[str, Any], param: str, text: str
) -> None:
    answer = await ask(**body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(SHAPE + text)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


async def test_prompts_may_be_token_ids() -> None:
    for prompt, prompts in (([5, 7], [[5, 7]]), ([[5], [7, 9]], [[5], [7, 9]])):
        engine = ScriptedEngine()
        assert (await ask(engine, prompt=prompt)).status_code == 200
        assert [request.prompt_ids for request in engine.requests] == prompts


async def test_one_prompt_that_fails_fails_all_and_ends_the_others() -> None:
    def script(request: Request) -> Sequence[list[Event]]:
        return [HOLD] if len(request.prompt_ids) > 2 else [[output("a")], [Failed("bad luck")]]

    engine = ScriptedEngine(script)
    answer = await ask(engine, prompt=["a b c", "a", "a b"])
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert engine.num_aborts == len(engine.requests) - 1


async def test_each_prompt_takes_a_permit() -> None:
    answer = await ask(ScriptedEngine(permits=1), prompt=["a", "b"])
    assert answer.status_code == 429
    assert answer.content == (
        b'{"error":{"message":"Model is overloaded","type":"rate_limit_error","param":null,'
        b'"code":"rate_limit_exceeded"}}'
    )


async def test_each_choice_takes_a_permit() -> None:
    assert (await ask(ScriptedEngine(permits=1), n=2)).status_code == 429
    assert (await ask(ScriptedEngine(permits=2), n=2)).status_code == 200


# Choices.


def numbered(request: Request) -> Sequence[list[Event]]:
    """Generate a text of the seed, with a mean logprob that falls with it."""
    text = f"s{request.sampling.seed}"
    return [[output(text, -0.5 * request.sampling.seed), finished(text, 1)]]


@pytest.mark.parametrize("stream", [False, True])
async def test_each_prompt_has_n_choices_with_seeds_that_follow(stream: bool) -> None:
    engine = ScriptedEngine(numbered)
    answer = await ask(engine, prompt=["a b", "a"], n=2, seed=5, stream=stream)
    chunks = events(answer) if stream else [answer.json()]
    choices = sorted(
        (choice["index"], choice["text"]) for chunk in chunks for choice in chunk["choices"]
    )
    assert choices == [(0, "s5"), (1, "s6"), (2, "s5"), (3, "s6")]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_prompt_counts_once_and_every_choice_counts(stream: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = await ask(ScriptedEngine(), n=3, stream=stream, **options)
    told = events(answer)[-1]["usage"] if stream else answer.json()["usage"]
    assert told == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}


async def test_the_best_of_several_are_returned_best_first() -> None:
    engine = ScriptedEngine(numbered)
    async with client(engine, max_best_of=4) as http:
        body = {"prompt": "x", "seed": 2, "best_of": 4, "n": 2, "temperature": 1}
        told = (await http.post(PATH, json=body)).json()
    assert [(c["index"], c["text"]) for c in told["choices"]] == [(0, "s2"), (1, "s3")]
    assert told["usage"]["completion_tokens"] == 4
    assert all(request.sampling.logprobs for request in engine.requests)


# Logprobs and echo.

TOP = (token(1, " Hi", -0.25), token(6, " Hello", -0.5), token(9, " you", -1.0))


def with_logprobs(request: Request) -> Sequence[list[Event]]:
    """Generate " Hello" and the end of the sequence; the prompt is <s>, "Say" and " hello"."""
    prompt = (token(1, "<s>", None, special=True), token(3, "Say", -1.5), token(4, " hello", -2.5))
    tops = ((), (token(2, "You", -0.75), token(3, "Say", -1.5)), (token(8, " it", -0.125),))
    end = finished(" Hello", 2, FinishReason.EOS_TOKEN)
    if request.prompt_logprobs:
        end = replace(end, prompt=prompt, prompt_top_tokens=tops)
    eos = TokenOutput(token(2, "</s>", -0.125, special=True), TOP[:1])
    return [[TokenOutput(token(6, " Hello"), TOP)], [eos, end]]


GENERATED: dict[str, list[Any]] = {
    "tokens": [" Hello", "</s>"],
    "token_logprobs": [-0.5, -0.125],
    "top_logprobs": [{" Hi": -0.25, " Hello": -0.5}, {" Hi": -0.25, "</s>": -0.125}],
    "text_offset": [0, 6],
}
ECHOED: dict[str, list[Any]] = {
    "tokens": ["<s>", "Say", " hello", " Hello", "</s>"],
    "token_logprobs": [None, -1.5, -2.5, -0.5, -0.125],
    "top_logprobs": [
        None,
        {"You": -0.75, "Say": -1.5},
        {" it": -0.125, " hello": -2.5},
        *GENERATED["top_logprobs"],
    ],
    "text_offset": [0, 0, 3, 9, 15],
}


def whole(answer: httpx2.Response, stream: bool) -> tuple[str, dict[str, list[Any]]]:
    """Return the text of the first choice and its logprobs, joined if it is a stream."""
    chunks = events(answer) if stream else [answer.json()]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == 0]
    text = "".join(choice["text"] for choice in choices)
    keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return text, {key: [x for c in choices for x in c["logprobs"][key]] for key in keys}


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_have_each_token_with_its_alternatives(stream: bool) -> None:
    answer = await ask(ScriptedEngine(with_logprobs), logprobs=2, stream=stream)
    assert whole(answer, stream) == (" Hello", GENERATED)


async def test_logprobs_of_zero_have_the_chosen_tokens_alone() -> None:
    answer = await ask(ScriptedEngine(with_logprobs), logprobs=0)
    _, told = whole(answer, False)
    assert told["top_logprobs"] == [{" Hello": -0.5}, {"</s>": -0.125}]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_repeats_the_prompt_with_its_logprobs(stream: bool) -> None:
    engine = ScriptedEngine(with_logprobs)
    answer = await ask(engine, logprobs=2, echo=True, stream=stream, n=2)
    assert whole(answer, stream) == ("Say hello Hello", ECHOED)
    assert [request.prompt_logprobs for request in engine.requests] == [True, False]
    assert engine.requests[0].prompt_top_tokens == 2
    chunks = events(answer) if stream else [answer.json()]
    second = [c for chunk in chunks for c in chunk["choices"] if c["index"] == 1]
    assert [choice["logprobs"] for choice in second] == [ECHOED]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Say hello", [1, 3, 5]])
async def test_echo_without_logprobs_repeats_the_prompt(prompt: object, stream: bool) -> None:
    engine = ScriptedEngine()
    answer = await ask(engine, prompt=prompt, echo=True, stream=stream)
    chunks = events(answer) if stream else [answer.json()]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == ("1 3 5 Hello you" if isinstance(prompt, list) else "Say hello Hello you")
    assert not engine.requests[0].prompt_logprobs


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "limit", [{"max_tokens": 0}, {"max_tokens": 9, "max_completion_tokens": 0}]
)
async def test_no_tokens_are_told_if_none_are_wanted(limit: dict[str, int], stream: bool) -> None:
    engine = ScriptedEngine(with_logprobs)
    answer = await ask(engine, logprobs=2, echo=True, stream=stream, **limit)
    text, told = whole(answer, stream)
    assert text == "Say hello"
    assert told == {key: values[:3] for key, values in ECHOED.items()}
    if not stream:
        assert answer.json()["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("text", "pieces", "offsets"),
    [
        ("Say hello", ["Say", " hello"], [0, 3]),
        ("Say hello", ["<s>", "Say", " hello"], [0, 0, 3]),
        ("Say hello", ["Say", "hello"], [0, 4]),
        ("a🙂🙃b", ["a", "\ufffd", "\ufffd", "\ufffd", "\ufffd", "b"], [0, 1, 1, 1, 1, 3]),
        ("aa", ["a", "a"], [0, 1]),
        ("x", ["never", "there"], [0, 0]),
        ("", [], []),
    ],
)
def test_a_token_is_found_where_it_is_in_the_text(
    text: str, pieces: list[str], offsets: list[int]
) -> None:
    assert text_offsets(text, pieces) == offsets


# Streams.


def events(answer: httpx2.Response) -> list[Any]:
    """Return the JSON of each event but the last, which must be [DONE]."""
    *frames, done, rest = answer.content.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return [json.loads(frame.removeprefix(b"data: ")) for frame in frames]


async def test_a_stream_is_openais_to_the_byte() -> None:
    answer = await ask(stream=True)
    assert answer.content == chunk(b" Hello") + chunk(b" you", b"length") + DONE
    assert dict(answer.headers) == {
        "content-type": "text/event-stream",
        "cache-control": "no-cache",
        "x-compute-type": "1-nvidia-h200",
        "x-compute-characters": "9",
        "x-accel-buffering": "no",
        "vary": "origin, access-control-request-method, access-control-request-headers",
        "access-control-allow-origin": "*",
    }


async def test_a_special_token_has_no_text_in_a_stream() -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        eos = TokenOutput(token(2, "</s>", special=True))
        return [[output("a")], [eos, finished("a", 2, FinishReason.EOS_TOKEN)]]

    answer = await ask(ScriptedEngine(script), stream=True)
    assert answer.content == chunk(b"a") + chunk(b"", b"stop") + DONE


def of_prompt(index: int, content: bytes) -> bytes:
    frames = [frame + b"\n\n" for frame in content.split(b"\n\n")]
    return b"".join(frame for frame in frames if b'"index":%d,' % index in frame)


async def test_each_prompt_has_its_chunks_and_done_comes_once() -> None:
    answer = await ask(ScriptedEngine(by_length), prompt=["a b", "a"], stream=True)
    assert of_prompt(0, answer.content) == chunk(b"a3") * 2 + chunk(b"b3", b"length")
    assert of_prompt(1, answer.content) == chunk(b"a2", index=1) + chunk(b"b2", b"length", 1)
    assert answer.content.endswith(DONE)
    assert answer.content.count(b"data: ") == 6
    assert answer.headers["x-compute-characters"] == "4"


async def test_a_slow_prompt_does_not_delay_the_others() -> None:
    def script(request: Request) -> Sequence[list[Event]]:
        return by_length(request) if len(request.prompt_ids) == 2 else [[output("a")], HOLD]

    engine = ScriptedEngine(script)
    body = {"prompt": ["a b", "a"], "stream": True}
    connection = Connection(make_app(engine), PATH, body)
    await until(lambda: b"b2" in connection.body())
    await connection.go_away()
    assert engine.num_aborts == 1


async def test_the_usage_of_all_comes_last_if_asked_for_and_is_null_before() -> None:
    options = {"include_usage": True}
    answer = await ask(
        ScriptedEngine(by_length), prompt=["a b", "a"], stream=True, stream_options=options
    )
    *chunks, last = events(answer)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    assert [chunk["usage"] for chunk in chunks] == [None] * 5


async def test_every_chunk_has_the_usage_so_far_if_asked_for() -> None:
    answer = await ask(stream=True, stream_options={"continuous_usage_stats": True})
    first = chunk(b" Hello", counted=usage(3, 1))
    assert answer.content == first + chunk(b" you", b"length", counted=usage(3, 2)) + DONE


async def test_a_prompt_that_fails_ends_the_stream_with_an_error() -> None:
    def script(request: Request) -> Sequence[list[Event]]:
        return [HOLD] if len(request.prompt_ids) > 2 else [[output("a"), Failed("no")]]

    engine = ScriptedEngine(script)
    options = {"include_usage": True}
    answer = await ask(engine, prompt=["a b", "a"], stream=True, stream_options=options)
    *chunks, last = events(answer)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a"]
    assert last == {
        "error": {
            "message": "Request failed during generation: no",
            "type": "server_error",
            "param": None,
            "code": None,
        }
    }
    assert engine.num_aborts == 1


async def test_chunks_of_several_prompts_that_are_pending_are_sent_together() -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        return [[output("a"), output("b")], [output("c"), finished("abc", 3)]]

    connection = Connection(make_app(ScriptedEngine(script)), PATH, {"prompt": "x", "stream": True})
    await connection.finished()
    sizes = [message["body"].count(b"data: ") for message in connection.sent[1:]]
    assert sizes == [2, 1, 1, 0]


@pytest.mark.parametrize("body", [{"prompt": ["x", "y", "z"]}, {"prompt": "x", "n": 3}], ids=str)
async def test_a_client_that_goes_away_ends_every_choice(body: dict[str, Any]) -> None:
    engine = ScriptedEngine(lambda _: [[output("a")], HOLD])
    connection = Connection(make_app(engine), PATH, body | {"stream": True})
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
