"""/v1/chat/completions without a stream: its answer to the byte, and what the engine gets."""

import re
import time
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest

from engine.core.errors import TemplateError
from engine.core.request import (
    Event,
    FinishReason,
    Request,
    SamplingParams,
)
from tests.api.client import client
from tests.api.scripted import (
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


async def test_top_logprobs_without_logprobs_are_not_computed() -> None:
    assert not (await asked(top_logprobs=2)).sampling.logprobs


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
    assert request.sampling == SamplingParams(do_sample=True, seed=seed)
    assert len(request.prompt_ids) == 3
    assert request.stopping.max_new_tokens == 2048 - 3


async def test_parameters_reach_the_engine() -> None:
    request = await asked(
        temperature=0.5,
        top_p=0.5,
        frequency_penalty=0.25,
        presence_penalty=-1.5,
        seed=7,
        stop=["a", "b"],
        max_tokens=9,
        ignore_eos=True,
    )
    assert request.sampling == SamplingParams(
        do_sample=True,
        temperature=0.5,
        top_p=0.5,
        frequency_penalty=0.25,
        presence_penalty=-1.5,
        seed=7,
    )
    assert request.stopping.stop == ("a", "b")
    assert request.stopping.max_new_tokens == 9
    assert request.stopping.ignore_eos


async def test_a_temperature_of_zero_is_greedy() -> None:
    request = await asked(temperature=0, top_p=1)
    assert not request.sampling.do_sample
    assert request.sampling.temperature == 1.0


async def test_top_p_below_one_samples_even_at_a_temperature_of_zero() -> None:
    assert (await asked(temperature=0, top_p=0.9)).sampling.do_sample


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


async def test_unknown_fields_are_ignored() -> None:
    more: dict[str, Any] = {
        "n": 2,
        "user": "me",
        "logit_bias": {"50256": -100},
        "metadata": {"a": "b"},
    }
    assert without_id(await ask(**more)) == without_id(await ask())


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
        ({"role": "assistant", "content": "a", "tool_calls": [CALL]}, "a"),
        ({"role": "assistant", "content": "a", "tool_calls": None}, "a"),
        ({"role": "tool", "content": "sunny", "tool_call_id": "0"}, "sunny"),
    ],
)
async def test_a_template_sees_a_role_and_a_text(message: dict[str, Any], content: str) -> None:
    engine = ScriptedEngine()
    answer = await ask(engine, messages=[*HELLO, message])
    assert answer.status_code == 200, answer.text
    role = message["role"]
    assert engine.tokenizer.chats == [([*HELLO, {"role": role, "content": content}], None)]


async def test_numbers_beyond_64_bits_in_a_call_are_kept() -> None:
    engine = ScriptedEngine()
    call = CALL | {"function": {"name": "f", "arguments": {"a": 10**30}}}
    await ask(engine, messages=[{"role": "assistant", "tool_calls": [call]}])
    assert str(10**30) in engine.tokenizer.chats[0][0][0]["content"]


# Refusals.


async def refused(**body: Any) -> tuple[int, dict[str, str]]:
    answer = await ask(**body)
    return answer.status_code, answer.json()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"top_p": 1.5}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"presence_penalty": 2.5}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
        ({"frequency_penalty": -3}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"temperature": -1}, "`temperature` must be strictly positive"),
        ({"max_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"top_logprobs": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        (
            {"response_format": {"type": "json_object", "value": {"type": "object"}}},
            "grammar is not valid: Grammar must have a 'properties' field",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}],
                    }
                ]
            },
            "image modality is not supported",
        ),
    ],
)
async def test_validation_errors_of_a_chat_are_tgis(body: dict[str, Any], text: str) -> None:
    told = {"error": f"Input validation error: {text}", "error_type": "validation"}
    assert await refused(**body) == (422, told)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_that_the_template_refuses_is_reported_by_status(stream: bool) -> None:
    engine = ScriptedEngine(permits=0)
    engine.tokenizer.template_error = TemplateError("template not found")
    answer = await ask(engine, stream=stream)
    assert answer.status_code == 422
    assert answer.content == (
        b'{"error":"Template error: template not found","error_type":"template_error"}'
    )


async def test_overload_is_429() -> None:
    answer = await ask(ScriptedEngine(permits=0))
    assert answer.status_code == 429
    assert answer.content == b'{"error":"Model is overloaded","error_type":"overloaded"}'


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
async def test_a_body_of_another_shape_is_rejected_in_text(body: dict[str, Any], text: str) -> None:
    answer = await ask(**body)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text.startswith(f"{SHAPE}{text} at line 1 column ")


async def test_messages_are_required() -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.post(PATH, json={})
    assert answer.text == f"{SHAPE}missing field `messages` at line 1 column 2"
