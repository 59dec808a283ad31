"""TGI's answers without a stream: their shape and key order to the byte, headers, best_of."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from engine.core.request import (
    Event,
    Failed,
    FinishReason,
    Request,
)
from tests.api.client import client
from tests.api.scripted import ScriptedEngine, finished, output, token

pytestmark = pytest.mark.anyio

TOKENS = (
    b'[{"id":6,"text":" Hello","logprob":-0.5,"special":false},'
    b'{"id":4,"text":" you","logprob":-2.5839844,"special":false}]'
)
DETAILS = (
    b'{"finish_reason":"length","generated_tokens":2,"seed":null,"prefill":[],"tokens":' + TOKENS
)


async def test_generate_answers_an_object_with_the_text_alone() -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.post("/generate", json={"inputs": "Say hello", "parameters": {}})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.content == b'{"generated_text":" Hello you"}'


@pytest.mark.parametrize("flag", ["details", "decoder_input_details"])
async def test_details_are_shown_on_request(flag: str) -> None:
    async with client(ScriptedEngine()) as http:
        body = {"inputs": "Say hello", "parameters": {flag: True}}
        answer = await http.post("/generate", json=body)
    assert answer.content == b'{"generated_text":" Hello you","details":' + DETAILS + b"}}"


async def test_top_tokens_are_lists_beside_the_tokens() -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        top = (token(2, "a", -0.1), token(3, "b", None))
        return [[output(" a", -0.1, top), finished(" a", 1, FinishReason.EOS_TOKEN, seed=7)]]

    async with client(ScriptedEngine(script)) as http:
        body = {"inputs": "x", "parameters": {"details": True, "top_n_tokens": 2}}
        answer = await http.post("/generate", json=body)
    assert answer.content == (
        b'{"generated_text":" a","details":{"finish_reason":"eos_token","generated_tokens":1,'
        b'"seed":7,"prefill":[],"tokens":[{"id":2,"text":" a","logprob":-0.1,"special":false}],'
        b'"top_tokens":[[{"id":2,"text":"a","logprob":-0.1,"special":false},'
        b'{"id":3,"text":"b","logprob":null,"special":false}]]}}'
    )


async def test_a_logprob_that_is_no_number_is_null() -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        return [[output("a", float("-inf")), finished("a", 1)]]

    async with client(ScriptedEngine(script)) as http:
        body = {"inputs": "x", "parameters": {"details": True}}
        answer = await http.post("/generate", json=body)
    assert b'"logprob":null' in answer.content


async def test_text_is_not_escaped_beyond_json() -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        return [[output("é"), finished('é🙂\n"', 1)]]

    async with client(ScriptedEngine(script)) as http:
        answer = await http.post("/generate", json={"inputs": "x"})
    assert answer.content == '{"generated_text":"é🙂\\n\\""}'.encode()


async def test_full_text_begins_with_the_prompt() -> None:
    async with client(ScriptedEngine()) as http:
        body = {"inputs": "Say hello", "parameters": {"return_full_text": True}}
        answer = await http.post("/generate", json=body)
    assert answer.json()["generated_text"] == "Say hello Hello you"


async def test_headers_have_times_and_counts() -> None:
    async with client(ScriptedEngine(), compute_type=None) as http:
        answer = await http.post("/generate", json={"inputs": "é x", "parameters": {}})
    headers = {key: value for key, value in answer.headers.items() if key.startswith("x-")}
    assert float(headers.pop("x-compute-time")) >= 0
    assert int(headers.pop("x-total-time")) >= int(headers.pop("x-validation-time")) >= 0
    assert headers == {
        "x-compute-type": "1-nvidia-h200",
        "x-compute-characters": "3",
        "x-queue-time": "250",
        "x-inference-time": "500",
        "x-time-per-token": "250",
        "x-prompt-tokens": "3",
        "x-generated-tokens": "2",
    }


async def test_compute_type_can_be_set() -> None:
    async with client(ScriptedEngine(), compute_type="1-a100") as http:
        answer = await http.post("/generate", json={"inputs": "x"})
    assert answer.headers["x-compute-type"] == "1-a100"


async def test_errors_have_no_headers_with_times() -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.post("/generate", json={"inputs": ""})
    assert not [key for key in answer.headers if key.startswith("x-")]


async def test_compat_route_answers_a_list() -> None:
    async with client(ScriptedEngine()) as http:
        body = {"inputs": "Hi", "parameters": {"return_full_text": False}, "stream": False}
        answer = await http.post("/", json=body)
    assert answer.content == b'[{"generated_text":" Hello you"}]'
    assert answer.headers["x-prompt-tokens"] == "2"


@pytest.mark.parametrize(
    ("tag", "text"),
    [("text-generation", "Hi Hello you"), (None, "Hi Hello you"), ("other", " Hello you")],
)
async def test_compat_route_repeats_the_prompt_for_text_generation(
    tag: str | None, text: str
) -> None:
    engine = ScriptedEngine()
    engine.model = replace(engine.model, pipeline_tag=tag)
    async with client(engine) as http:
        for parameters in ({}, {"return_full_text": None}):
            answer = await http.post("/", json={"inputs": "Hi", "parameters": parameters})
            assert answer.json()[0]["generated_text"] == text


async def test_compat_route_does_not_wrap_errors() -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.post("/", json={"inputs": ""})
    assert answer.json()["error_type"] == "validation"


async def test_generate_ignores_stream() -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.post("/generate", json={"inputs": "x", "stream": True})
    assert answer.json() == {"generated_text": " Hello you"}


@pytest.mark.parametrize(
    ("means", "body"),
    [
        (True, {"inputs": "x"}),
        (False, {"inputs": "x", "parameters": {}}),
        (False, {"inputs": "x", "parameters": {"temperature": 1.0}}),
        (True, {"inputs": "x", "parameters": {"temperature": 0.7}}),
        (True, {"inputs": "x", "parameters": {"top_k": 5}}),
        (True, {"inputs": "x", "parameters": {"top_p": 0.9}}),
        (True, {"inputs": "x", "parameters": {"typical_p": 0.9}}),
    ],
)
async def test_a_request_samples_if_its_parameters_ask_for_it(means: bool, body: object) -> None:
    engine = ScriptedEngine()
    async with client(engine) as http:
        await http.post("/generate", json=body)
    assert engine.requests[0].sampling.do_sample is means


async def test_the_engine_gets_the_parameters_of_the_request() -> None:
    engine = ScriptedEngine()
    parameters = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.5, "typical_p": 0.25, "seed": 2**64 - 1,
        "repetition_penalty": 1.5, "frequency_penalty": -0.5, "stop": ["a", "b"],
        "max_new_tokens": 7, "truncate": 2, "details": True, "top_n_tokens": 5,
        "adapter_id": "ignored", "unknown": "ignored",
    }  # fmt: skip
    async with client(engine) as http:
        await http.post("/generate", json={"inputs": "one two three", "parameters": parameters})
    request = engine.requests[0]
    assert request.prompt_ids == [3, 5]
    assert (request.stopping.max_new_tokens, request.stopping.stop) == (7, ("a", "b"))
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 3, 0.5)
    assert (sampling.typical_p, sampling.seed) == (0.25, 2**64 - 1)
    assert (sampling.repetition_penalty, sampling.frequency_penalty) == (1.5, -0.5)
    assert (sampling.logprobs, sampling.top_n_tokens) == (True, 5)


async def test_logprobs_are_not_computed_for_an_answer_without_details() -> None:
    engine = ScriptedEngine()
    async with client(engine) as http:
        body = {"inputs": "x", "parameters": {"top_n_tokens": 5}}
        await http.post("/generate", json=body)
    sampling = engine.requests[0].sampling
    assert (sampling.logprobs, sampling.top_n_tokens) == (False, 0)


@pytest.mark.parametrize(("asked", "given"), [(None, 2046), (20, 20), (5000, 2046)])
async def test_output_ends_at_the_end_of_the_context(asked: int | None, given: int) -> None:
    engine = ScriptedEngine()
    async with client(engine) as http:
        body = {"inputs": "x", "parameters": {"max_new_tokens": asked}}
        answer = await http.post("/generate", json=body)
    assert answer.status_code == 200
    assert engine.requests[0].stopping.max_new_tokens == given


async def test_every_parameter_of_tgis_python_client_is_accepted() -> None:
    nulls = dict.fromkeys(
        ("best_of", "repetition_penalty", "frequency_penalty", "seed", "temperature", "top_k",
         "top_p", "truncate", "typical_p", "top_n_tokens", "grammar")
    )  # fmt: skip
    flags = dict.fromkeys(
        ("do_sample", "return_full_text", "details", "decoder_input_details", "watermark"), False
    )
    async with client(ScriptedEngine()) as http:
        parameters = nulls | flags | {"max_new_tokens": 20, "stop": []}
        answer = await http.post("/", json={"inputs": "x", "parameters": parameters})
    assert answer.status_code == 200


def descending(*logprobs: float) -> ScriptedEngine:
    """Return an engine whose generations have one token each, with the next of `logprobs`."""
    order = itertools.cycle(logprobs)

    def script(request: Request) -> Sequence[list[Event]]:
        logprob = next(order)
        text, seed = str(logprob), request.sampling.seed
        return [[output(text, logprob), finished(text, 1, seed=seed)]]

    return ScriptedEngine(script)


@pytest.mark.parametrize(
    ("logprobs", "texts"),
    [
        ((-2.0, -1.0, -3.0), ["-1.0", "-2.0", "-3.0"]),
        ((-1.0, -1.0, -2.0), ["-1.0", "-1.0", "-2.0"]),
        ((-1.0, -2.0, -0.5), ["-0.5", "-1.0", "-2.0"]),
    ],
)
async def test_best_of_answers_the_likeliest_and_shows_the_others_in_order(
    logprobs: tuple[float, ...], texts: list[str]
) -> None:
    async with client(descending(*logprobs), max_best_of=3) as http:
        body = {"inputs": "x", "parameters": {"best_of": 3, "do_sample": True, "details": True}}
        answer = (await http.post("/generate", json=body)).json()
    others = answer["details"]["best_of_sequences"]
    assert [answer["generated_text"], *(other["generated_text"] for other in others)] == texts


async def test_best_of_sequences_have_their_own_shape_and_seed() -> None:
    engine = descending(-1.0, -2.0)
    async with client(engine) as http:
        parameters = {"best_of": 2, "top_k": 2, "details": True, "return_full_text": True}
        answer = await http.post("/generate", json={"inputs": "x", "parameters": parameters})
    first, second = (request.sampling.seed for request in engine.requests)
    assert first != second
    assert answer.content == (
        b'{"generated_text":"x-1.0","details":{"finish_reason":"length","generated_tokens":1,'
        b'"seed":%d,"prefill":[],"tokens":[{"id":4,"text":"-1.0","logprob":-1.0,"special":false}],'
        b'"best_of_sequences":[{"generated_text":"x-2.0","finish_reason":"length",'
        b'"generated_tokens":1,"seed":%d,"prefill":[],"tokens":[{"id":4,"text":"-2.0",'
        b'"logprob":-2.0,"special":false}]}]}}' % (first, second)
    )


async def test_best_of_zero_is_one() -> None:
    engine = ScriptedEngine()
    async with client(engine) as http:
        answer = await http.post("/generate", json={"inputs": "x", "parameters": {"best_of": 0}})
    assert answer.status_code == 200
    assert len(engine.requests) == 1


async def test_best_of_takes_a_permit_for_each_sequence() -> None:
    body = {"inputs": "x", "parameters": {"best_of": 2, "do_sample": True}}
    async with client(ScriptedEngine(permits=1)) as http:
        answer = await http.post("/generate", json=body)
    assert answer.status_code == 429


async def test_best_of_fails_if_one_sequence_fails() -> None:
    ends: Iterator[Event] = iter([finished("a", 1), Failed("out of luck")])
    engine = ScriptedEngine(lambda _: [[output("a"), next(ends)]])
    async with client(engine) as http:
        body = {"inputs": "x", "parameters": {"best_of": 2, "do_sample": True}}
        answer = await http.post("/generate", json=body)
    assert answer.status_code == 424
