"""/v1/chat/completions without a stream: its answer to the byte, and what the engine gets."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from engine.core.errors import TemplateError
from engine.core.request import (
    Event,
    Failed,
    FinishReason,
    ReachedStop,
    Request,
    SamplingParams,
)
from tests.api.client import client
from tests.api.scripted import (
    HOLD,
    ScriptedEngine,
    ScriptedGrammar,
    finished,
    grammar_of,
    output,
    token,
)

pytestmark = pytest.mark.anyio

PATH = "/v1/chat/completions"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Say hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1700000000.5)


def one_token(reason: FinishReason = FinishReason.EOS_TOKEN) -> Any:
    def script(_: Request) -> Sequence[list[Event]]:
        return [[output("Hi"), finished("Hi", 1, reason)]]

    return script


async def ask(engine: ScriptedEngine | None = None, **body: Any) -> httpx2.Response:
    async with client(engine or ScriptedEngine(), compute_type="cpu") as http:
        return await http.post(PATH, json={"messages": HELLO} | body)


def without_id(answer: httpx2.Response) -> bytes:
    id = answer.json()["id"]
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", id)
    return answer.content.replace(id.encode(), b"")


def chunks_of(answer: httpx2.Response) -> list[dict[str, Any]]:
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def asked(**body: Any) -> Request:
    engine = ScriptedEngine()
    answer = await ask(engine, **body)
    assert answer.status_code == 200, answer.text
    return engine.requests[0]


async def test_an_answer_is_openais_to_the_byte() -> None:
    answer = await ask()
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert without_id(answer) == (
        b'{"object":"chat.completion","id":"","created":1700000000,"model":"org/model",'
        b'"system_fingerprint":"3.3.6-dev0-native","choices":[{"index":0,"message":'
        b'{"role":"assistant","content":" Hello you","refusal":null},"logprobs":null,'
        b'"finish_reason":"length"}],'
        b'"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
    )


async def test_headers_are_those_of_generate() -> None:
    answer = await ask()
    names = {name for name in answer.headers if name.startswith("x-")}
    assert names == {
        "x-compute-type",
        "x-compute-time",
        "x-compute-characters",
        "x-total-time",
        "x-validation-time",
        "x-queue-time",
        "x-inference-time",
        "x-time-per-token",
        "x-prompt-tokens",
        "x-generated-tokens",
    }
    assert answer.headers["x-compute-characters"] == str(len("user: Say hello"))
    assert answer.headers["x-prompt-tokens"] == "3"


async def test_every_token_has_its_logprob_and_the_top_ones() -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        top = (token(2, "a", -0.1), token(3, "b", None))
        end = output("</s>", -2.5839844)
        return [[output(" a", -0.1, top)], [end, finished(" a", 2, FinishReason.EOS_TOKEN)]]

    engine = ScriptedEngine(script)
    answer = await ask(engine, logprobs=True, top_logprobs=2)
    assert (
        b'"logprobs":{"content":[{"token":" a","logprob":-0.1,"bytes":[32,97],"top_logprobs":'
        b'[{"token":"a","logprob":-0.1,"bytes":[97]},{"token":"b","logprob":null,"bytes":[98]}]},'
        b'{"token":"</s>","logprob":-2.5839844,"bytes":[60,47,115,62],"top_logprobs":[]}],'
        b'"refusal":null},"finish_reason":"stop"'
    ) in answer.content
    assert engine.requests[0].sampling.top_n_tokens == 2


async def test_up_to_twenty_top_logprobs_may_be_asked_for() -> None:
    request = await asked(logprobs=True, top_logprobs=20)
    assert request.sampling.top_n_tokens == 20
    assert request.sampling.raw_logprobs


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (FinishReason.EOS_TOKEN, "stop"),
        (FinishReason.LENGTH, "length"),
        (FinishReason.STOP_SEQUENCE, "stop"),
    ],
)
async def test_finish_reasons_are_openais(reason: FinishReason, told: str) -> None:
    answer = await ask(ScriptedEngine(one_token(reason)))
    assert answer.json()["choices"][0]["finish_reason"] == told


@pytest.mark.parametrize(
    ("named", "told"), [(None, "org/model"), ("tgi", "org/model"), ("gpt-4o", "gpt-4o")]
)
async def test_the_model_is_the_served_one_or_the_name_asked_for(
    named: str | None, told: str
) -> None:
    assert (await ask(model=named)).json()["model"] == told


# What becomes of the parameters.


async def test_a_chat_samples_at_a_temperature_of_one_and_adds_no_special_tokens() -> None:
    request = await asked()
    seed = request.sampling.seed
    assert request.sampling == SamplingParams(do_sample=True, seed=seed, raw_logprobs=True)
    assert len(request.prompt_ids) == 3
    assert request.stopping.max_new_tokens == 2048 - 3


async def test_parameters_reach_the_engine() -> None:
    request = await asked(
        temperature=0.5,
        top_p=0.5,
        frequency_penalty=0.25,
        presence_penalty=-1.5,
        logit_bias={"5": -100},
        seed=7,
        stop=["a", "b"],
        max_tokens=9,
        ignore_eos=True,
    )
    assert request.sampling == SamplingParams(
        do_sample=True,
        temperature=0.5,
        top_p=0.5,
        output_frequency_penalty=0.25,
        presence_penalty=-1.5,
        logit_bias=((5, -100.0),),
        seed=7,
        raw_logprobs=True,
    )
    assert request.stopping.stop == ("a", "b")
    assert request.stopping.max_new_tokens == 9
    assert request.stopping.ignore_eos


async def test_a_temperature_of_zero_is_greedy() -> None:
    request = await asked(temperature=0, top_p=1)
    assert not request.sampling.do_sample
    assert request.sampling.temperature == 1.0


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": None}, 3),
    ],
)
async def test_the_limit_of_new_tokens_has_two_names(limits: dict[str, int], expected: int) -> None:
    assert (await asked(**limits)).stopping.max_new_tokens == expected


async def test_stop_may_be_one_string() -> None:
    assert (await asked(stop="end")).stopping.stop == ("end",)


async def test_null_equals_absent() -> None:
    names = (
        "model frequency_penalty logit_bias logprobs top_logprobs max_tokens "
        "max_completion_tokens n presence_penalty stop stream seed temperature top_p tools "
        "tool_choice tool_prompt response_format stream_options ignore_eos user"
    )
    assert without_id(await ask(**dict.fromkeys(names.split()))) == without_id(await ask())


async def test_fields_that_change_no_answer_are_accepted() -> None:
    more: dict[str, Any] = {
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "service_tier": "auto",
        "modalities": ["text"],
        "unheard_of": 1,
    }
    assert without_id(await ask(**more)) == without_id(await ask())


# Several answers.


def by_seed(request: Request) -> Sequence[list[Event]]:
    seed = str(request.sampling.seed)
    return [[output("seed ")], [output(seed), finished(f"seed {seed}", 2)]]


SEEDED = [f"seed {2**64 - 1}", "seed 0", "seed 1"]


async def test_n_answers_have_seeds_that_follow_one_another() -> None:
    answer = await ask(ScriptedEngine(by_seed), n=3, seed=2**64 - 1)
    told = answer.json()
    assert [choice["message"]["content"] for choice in told["choices"]] == SEEDED
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]
    assert told["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    assert answer.headers["x-generated-tokens"] == "6"


async def test_n_streamed_answers_are_the_unstreamed_ones() -> None:
    options = {"include_usage": True}
    streamed = await ask(
        ScriptedEngine(by_seed), n=3, seed=2**64 - 1, stream=True, stream_options=options
    )
    *chunks, last = chunks_of(streamed)
    choices = [chunk["choices"][0] for chunk in chunks]
    for index, text in enumerate(SEEDED):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["delta"]["content"] for choice in own) == text
        assert ["role" in choice["delta"] for choice in own] == [True, False, False]
        assert [choice["finish_reason"] for choice in own] == [None, None, "length"]
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}


@pytest.mark.parametrize("stream", [False, True])
async def test_n_answers_need_a_permit_each(stream: bool) -> None:
    assert (await ask(ScriptedEngine(permits=2), n=3, stream=stream)).status_code == 429
    assert (await ask(ScriptedEngine(permits=3), n=3, stream=stream)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_fails_ends_the_others(stream: bool) -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        return [HOLD] if len(engine.requests) == 2 else [[Failed("bad luck")]]

    engine = ScriptedEngine(script)
    answer = await ask(engine, n=2, stream=stream)
    assert "Request failed during generation: bad luck" in answer.text
    assert engine.num_aborts >= 1


# Stop strings.


@pytest.mark.parametrize("reason", [FinishReason.STOP_SEQUENCE, FinishReason.LENGTH])
async def test_the_text_is_cut_before_its_stop_string(reason: FinishReason) -> None:
    def script(_: Request) -> Sequence[list[Event]]:
        end = replace(finished("It is lovely", 3, reason), stop=ReachedStop("is l", "It "))
        return [[output("It i")], [output("s")], [output(" lovely"), end]]

    stop = ["is l", "none"]
    (choice,) = (await ask(ScriptedEngine(script), stop=stop)).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It ", "stop")
    streamed = chunks_of(await ask(ScriptedEngine(script), stop=stop, stream=True))
    choices = [chunk["choices"][0] for chunk in streamed]
    assert "".join(choice["delta"]["content"] for choice in choices) == "It "
    assert choices[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_text_that_might_have_become_a_stop_string_is_shown_at_the_end(stream: bool) -> None:
    answer = await ask(stop=["you and me"], stream=stream)
    assert "you" in answer.text


# Formats.


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json", "value": SCHEMA},
        {"type": "json_object", "value": SCHEMA},
        {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
    ],
)
async def test_a_schema_may_have_tgis_shapes_and_openais(response_format: object) -> None:
    request = await asked(response_format=response_format)
    assert grammar_of(request) == ScriptedGrammar("json", SCHEMA)


async def test_json_object_without_a_schema_means_any_object() -> None:
    request = await asked(response_format={"type": "json_object"})
    assert grammar_of(request) == ScriptedGrammar("json", {"type": "object"})


async def test_openais_schema_need_not_list_properties() -> None:
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert grammar_of(await asked(response_format=wanted)) == ScriptedGrammar("json", schema)


async def test_a_regex_is_compiled_for_the_engine() -> None:
    request = await asked(response_format={"type": "regex", "value": "[a-z]+"})
    assert grammar_of(request) == ScriptedGrammar("regex", "[a-z]+")


async def test_a_text_format_needs_no_grammar() -> None:
    assert (await asked(response_format={"type": "text"})).grammar is None


# Messages.

CALL = {"id": "0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
FLAT = (
    '[{"id":"0","type":"function","function":{"description":null,"name":"f",'
    '"arguments":"\\"{\\\\\\"a\\\\\\": 1}\\""}}]'
)


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"role": "user", "content": "a"}, "a"),
        ({"role": "user", "content": "a", "name": "Ann"}, "a"),
        ({"role": "whoever", "content": ""}, ""),
        ({"role": "user", "content": None}, ""),
        ({"role": "user", "content": []}, ""),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            "ab",
        ),
        ({"role": "assistant", "tool_calls": [CALL]}, FLAT),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, FLAT),
        ({"role": "assistant", "content": "", "tool_calls": [CALL]}, FLAT),
        ({"role": "assistant", "content": "a", "tool_calls": [CALL]}, f"a\n{FLAT}"),
        ({"role": "assistant", "content": [], "tool_calls": [CALL]}, FLAT),
        ({"role": "assistant", "refusal": "no"}, "no"),
        ({"role": "assistant", "content": None, "refusal": "no"}, "no"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        ({"role": "assistant", "content": "a", "tool_calls": None}, "a"),
        ({"role": "tool", "content": [{"type": "text", "text": "sunny"}]}, "sunny"),
        ({"role": "system", "content": [{"type": "text", "text": "a"}]}, "a"),
    ],
)
async def test_a_template_sees_a_role_and_a_text(message: dict[str, Any], content: str) -> None:
    engine = ScriptedEngine()
    answer = await ask(engine, messages=[*HELLO, message])
    assert answer.status_code == 200, answer.text
    role = message["role"]
    assert engine.tokenizer.chats == [([*HELLO, {"role": role, "content": content}], None)]


async def test_the_result_of_a_tool_names_its_call() -> None:
    engine = ScriptedEngine()
    result = {"role": "tool", "content": "sunny", "tool_call_id": "call_1"}
    assert (await ask(engine, messages=[*HELLO, result])).status_code == 200
    assert engine.tokenizer.chats[0][0][1] == result


@pytest.mark.parametrize(("words", "role"), [(set(), "system"), ({"developer"}, "developer")])
async def test_a_developer_is_the_system_unless_the_template_knows_it(
    words: set[str], role: str
) -> None:
    engine = ScriptedEngine()
    engine.tokenizer.words = words
    await ask(engine, messages=[{"role": "developer", "content": "Be brief"}, *HELLO])
    assert engine.tokenizer.chats[0][0][0] == {"role": role, "content": "Be brief"}


@pytest.mark.parametrize(
    ("arguments", "told"), [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ('{"a"', '{"a"')]
)
async def test_a_template_that_knows_calls_gets_them_with_their_arguments(
    arguments: Any, told: Any
) -> None:
    engine = ScriptedEngine()
    engine.tokenizer.words = {"tool_calls"}
    call = CALL | {"function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": "a", "tool_calls": [call]}
    assert (await ask(engine, messages=[*HELLO, message])).status_code == 200
    expected = CALL | {"function": {"name": "f", "arguments": told}}
    assert engine.tokenizer.chats[0][0][1] == message | {"tool_calls": [expected]}


async def test_numbers_beyond_64_bits_in_a_call_are_kept() -> None:
    engine = ScriptedEngine()
    call = CALL | {"function": {"name": "f", "arguments": {"a": 10**30}}}
    await ask(engine, messages=[{"role": "assistant", "tool_calls": [call]}])
    assert str(10**30) in engine.tokenizer.chats[0][0][0]["content"]


# Refusals.


def error(message: str, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {
        "error": {
            "message": message,
            "type": "invalid_request_error",
            "param": field,
            "code": code,
        }
    }


IMAGE = {"type": "image_url", "image_url": {"url": "http://a/b.png"}}
TGIS_OBJECT = {"type": "json_object", "value": {"type": "object"}}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"top_p": 1.5}, "top_p", "`top_p` must be >= 0.0 and <= 1.0. Given: 1.5"),
    ({"presence_penalty": 2.5}, "presence_penalty", "`presence_penalty` must be >= -2.0"),
    ({"frequency_penalty": -3}, "frequency_penalty", "`frequency_penalty` must be >= -2.0"),
    ({"temperature": -1}, "temperature", "`temperature` must be >= 0.0. Given: -1.0"),
    ({"max_tokens": 0}, "max_tokens", "`max_new_tokens` must be strictly positive"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "`top_logprobs` must be >= 0 and"),
    ({"top_logprobs": 2}, "top_logprobs", "`top_logprobs` is only allowed when `logprobs` is"),
    ({"n": 0}, "n", "`n` must be >= 1 and <= 128. Given: 0"),
    ({"n": 129}, "n", "`n` must be >= 1 and <= 128. Given: 129"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "`logit_bias` must be >= -100.0 and"),
    ({"response_format": TGIS_OBJECT}, "response_format", "grammar is not valid: Grammar must"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages", "image modality is not"),
    ({"tool_choice": "required"}, "tool_choice", "`tool_choice` is only allowed when `tools`"),
    ({"tool_choice": "f", "tools": []}, "tool_choice", "`tool_choice` is only allowed when"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "`stream_options` is only"),
]


@pytest.mark.parametrize(("body", "field", "text"), REFUSED)
async def test_a_refusal_names_the_field(body: dict[str, Any], field: str, text: str) -> None:
    answer = await ask(**body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith(f"Input validation error: {text}")
    assert answer.json() == error(message, field)


@pytest.mark.parametrize(
    "field", ["audio", "function_call", "functions", "modalities", "web_search_options"]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_served_is_refused(field: str, stream: bool) -> None:
    body: dict[str, Any] = {field: ["audio"], "stream": stream}
    answer = await ask(**body)
    assert answer.status_code == 400
    told = f"Input validation error: `{field}` is not supported"
    assert answer.json() == error(told, field, "unsupported_parameter")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_that_the_template_refuses_is_reported_by_status(stream: bool) -> None:
    engine = ScriptedEngine(permits=0)
    engine.tokenizer.template_error = TemplateError("template not found")
    answer = await ask(engine, stream=stream)
    assert answer.status_code == 400
    assert answer.json() == error("Template error: template not found", "messages")


@pytest.mark.parametrize("stream", [False, True])
async def test_overload_is_429(stream: bool) -> None:
    answer = await ask(ScriptedEngine(permits=0), stream=stream)
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"


SHAPE = "Failed to deserialize the JSON body into the target type: "


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"messages": "x"}, 'messages: invalid type: string "x", expected a sequence'),
        (
            {"messages": [{"role": "user"}]},
            "messages[0]: data did not match any variant of untagged enum MessageBody",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages[0]: data did not match any variant of untagged enum MessageBody",
        ),
        ({"messages": [{"content": "x"}]}, "messages[0]: missing field `role`"),
        ({"max_tokens": -1}, "max_tokens: invalid value: integer `-1`, expected u32"),
        ({"stop": 1}, "stop: invalid type: integer `1`, expected a sequence"),
        ({"stream": "yes"}, 'stream: invalid type: string "yes", expected a boolean'),
        ({"response_format": {"type": "json"}}, "response_format: missing field `value`"),
        (
            {"response_format": {"type": "xml"}},
            "response_format: unknown variant `xml`, expected one of `json`, `json_object`, "
            "`regex`, `json_schema`, `text`",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
            "response_format.json_schema.schema: invalid type: integer `1`, expected a map",
        ),
        (
            {"tool_choice": 3},
            "tool_choice: data did not match any variant of untagged enum ToolTypeDeserializer",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0]: missing field `function`"),
    ],
)
async def test_a_body_of_another_shape_is_refused(body: dict[str, Any], text: str) -> None:
    answer = await ask(**body)
    assert answer.status_code == 400
    told = answer.json()["error"]
    assert told["message"].startswith(f"{SHAPE}{text} at line 1 column ")
    assert told["param"].startswith(next(iter(body)))


async def test_messages_are_required() -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.post(PATH, json={})
    message = f"{SHAPE}missing field `messages` at line 1 column 2"
    assert answer.json()["error"]["message"] == message
