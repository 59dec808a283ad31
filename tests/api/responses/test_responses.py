"""OpenAI's Responses: what the model is asked, and the response when it is complete."""

import time
from typing import Any

import httpx2
import pytest

from engine.core.request import FinishReason
from tests.api.client import client
from tests.api.saying import CALL, NO_TOOL, saying
from tests.api.scripted import ScriptedEngine, ScriptedGrammar, grammar_of

pytestmark = pytest.mark.anyio

PATH = "/v1/responses"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "description": "Tells it", "parameters": CITY}
CLOCK = {"type": "function", "name": "clock"}


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1700000000.5)


async def ask(engine: ScriptedEngine | None = None, **body: Any) -> httpx2.Response:
    async with client(engine or saying()) as http:
        return await http.post(PATH, json={"model": "m", "input": "Hi"} | body)


async def prompt_of(input: Any, **body: Any) -> list[dict[str, Any]]:
    """Return the messages that the template gets for an input."""
    engine = saying()
    answer = await ask(engine, input=input, **body)
    assert answer.status_code == 200, answer.text
    return [dict(message) for message in engine.tokenizer.chats[-1][0]]


async def test_a_text_is_answered_with_a_message() -> None:
    answer = (await ask()).json()
    (item,) = answer.pop("output")
    assert answer.pop("id").startswith("resp_")
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [
            {"type": "output_text", "text": " Hello you", "annotations": [], "logprobs": []}
        ],
    }
    assert answer == {
        "object": "response",
        "created_at": 1700000000,
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "model": "m",
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 2,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 3,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 5,
        },
    }


async def test_ids_are_unique() -> None:
    engine = saying()
    first, second = (await ask(engine)).json(), (await ask(engine)).json()
    assert first["id"] != second["id"]
    assert first["output"][0]["id"] != second["output"][0]["id"]


async def test_an_answer_that_is_cut_is_incomplete() -> None:
    answer = (await ask(saying(reason=FinishReason.LENGTH), max_output_tokens=2)).json()
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["max_output_tokens"] == 2
    assert answer["output"][0]["status"] == "incomplete"


async def test_parameters_reach_the_engine() -> None:
    engine = saying()
    await ask(engine, max_output_tokens=7, temperature=0.5, top_p=0.25)
    (request,) = engine.requests
    assert request.stopping.max_new_tokens == 7
    sampling = request.sampling
    assert (sampling.do_sample, sampling.temperature, sampling.top_p) == (True, 0.5, 0.25)


async def test_a_temperature_of_0_is_greedy_and_null_is_absent() -> None:
    engine = saying()
    await ask(engine, temperature=0, top_p=None, tools=None, text=None, include=None)
    assert not engine.requests[0].sampling.do_sample


@pytest.mark.parametrize(
    "input",
    [
        "Hi",
        [{"role": "user", "content": "Hi"}],
        [{"type": "message", "role": "user", "content": "Hi"}],
        [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
    ],
)
async def test_a_text_and_each_form_of_a_message_make_the_same_prompt(input: Any) -> None:
    assert await prompt_of(input) == [{"role": "user", "content": "Hi"}]


async def test_parts_of_a_message_are_joined_by_line_breaks() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    (message,) = await prompt_of([{"role": "user", "content": parts}])
    assert message["content"] == "a\nb"


async def test_instructions_and_the_first_system_messages_are_one() -> None:
    input = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "Be quick."},
    ]
    messages = await prompt_of(input, instructions="Be brief.")
    assert messages == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "Be quick."},
    ]


async def test_the_output_of_an_answer_can_be_sent_back() -> None:
    first = (await ask()).json()["output"]
    call = (await ask(saying(*CALL), tools=[WEATHER], tool_choice="required")).json()["output"]
    history = [
        {"role": "user", "content": "Hi"},
        *first,
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"role": "user", "content": "Weather?"},
        *call,
        {"type": "function_call_output", "call_id": call[0]["call_id"], "output": "rain"},
    ]
    messages = await prompt_of(history)
    roles = [message["role"] for message in messages]
    assert roles == ["user", "assistant", "user", "assistant", "tool"]
    assert messages[1]["content"] == " Hello you"
    assert "weather" in str(messages[3])
    assert messages[4]["content"] == "rain"


async def test_calls_that_follow_one_another_are_one_message() -> None:
    calls = [
        {"type": "function_call", "call_id": f"c{n}", "name": f"tool_{n}", "arguments": "{}"}
        for n in range(2)
    ]
    outputs = [
        {"type": "function_call_output", "call_id": "c0", "output": "zero"},
        {
            "type": "function_call_output",
            "call_id": "c1",
            "output": [{"type": "input_text", "text": "one"}],
        },
    ]
    user = {"role": "user", "content": "Go"}
    messages = await prompt_of([user, *calls, *outputs])
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool"]
    assert "tool_0" in str(messages[1])
    assert "tool_1" in str(messages[1])
    assert [message["content"] for message in messages[2:]] == ["zero", "one"]


async def test_a_call_is_an_item_with_its_arguments() -> None:
    answer = (await ask(saying(*CALL), tools=[WEATHER, CLOCK])).json()
    (item,) = answer["output"]
    assert item.pop("id").startswith("fc_")
    assert item.pop("call_id").startswith("call_")
    assert item == {
        "type": "function_call",
        "status": "completed",
        "name": "weather",
        "arguments": '{"city": "Oslo"}',
    }
    assert answer["status"] == "completed"
    assert [tool["name"] for tool in answer["tools"]] == ["weather", "clock"]
    assert answer["tools"][0] == WEATHER | {"strict": None}


async def test_a_model_that_calls_no_tool_answers_in_words() -> None:
    answer = (await ask(saying(*NO_TOOL), tools=[WEATHER])).json()
    assert answer["output"][0]["content"][0]["text"] == " Hello you"


async def test_a_call_that_is_cut_is_incomplete() -> None:
    answer = (await ask(saying(*CALL[:6], reason=FinishReason.LENGTH), tools=[WEATHER])).json()
    (item,) = answer["output"]
    assert (item["status"], item["arguments"]) == ("incomplete", '{"city":')
    assert answer["status"] == "incomplete"


ALLOWED: dict[str, Any] = {"type": "allowed_tools", "mode": "required", "tools": [CLOCK]}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (None, ["weather", "clock", "no_tool"]),
        ("auto", ["weather", "clock", "no_tool"]),
        ("required", ["weather", "clock"]),
        ({"type": "function", "name": "clock"}, ["clock"]),
        (ALLOWED, ["clock"]),
        (ALLOWED | {"mode": "auto"}, ["clock", "no_tool"]),
    ],
)
async def test_the_choice_of_a_tool(choice: Any, names: list[str]) -> None:
    engine = saying('{"name": "clock", "parameters": {}}')
    answer = await ask(engine, tools=[WEATHER, CLOCK], tool_choice=choice)
    assert answer.status_code == 200, answer.text
    grammar = grammar_of(engine.requests[0])
    assert isinstance(grammar, ScriptedGrammar)
    assert isinstance(grammar.source, tuple)
    assert [name for name, _ in grammar.source] == names
    assert answer.json()["tool_choice"] == (choice or "auto") or choice is ALLOWED


async def test_no_tool_is_offered_if_none_may_be_called() -> None:
    engine = saying()
    await ask(engine, tools=[WEATHER], tool_choice="none")
    assert engine.requests[0].grammar is None
    assert engine.tokenizer.chats[0][1] is None


@pytest.mark.parametrize(
    ("format", "schema"),
    [
        ({"type": "json_schema", "name": "city", "schema": CITY, "strict": True}, CITY),
        ({"type": "json_object"}, {"type": "object"}),
    ],
)
async def test_a_format_is_a_grammar(format: Any, schema: Any) -> None:
    engine = saying("{}")
    answer = (await ask(engine, text={"format": format, "verbosity": "low"})).json()
    assert grammar_of(engine.requests[0]) == ScriptedGrammar("json", schema)
    assert answer["text"]["format"]["type"] == format["type"]


async def test_the_format_text_is_no_grammar() -> None:
    engine = saying()
    await ask(engine, text={"format": {"type": "text"}})
    assert engine.requests[0].grammar is None


@pytest.mark.parametrize(
    "asked", [{"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}]
)
async def test_logprobs_are_there_if_they_are_asked_for(asked: Any) -> None:
    answer = (await ask(**asked)).json()
    logprobs = answer["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs] == [" Hello", " you", "</s>"]
    assert {"token", "logprob", "bytes", "top_logprobs"} == set(logprobs[0])


@pytest.mark.parametrize(
    "ignored",
    [
        {"store": True},
        {"reasoning": {"effort": "low"}, "include": ["reasoning.encrypted_content"]},
        {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k"},
        {"service_tier": "auto", "max_tool_calls": 3, "truncation": "auto"},
        {"parallel_tool_calls": False, "stream_options": {"include_obfuscation": False}},
        {"background": False, "previous_response_id": None, "conversation": None},
    ],
)
async def test_what_changes_nothing_is_accepted(ignored: Any) -> None:
    answer = (await ask(**ignored)).json()
    assert answer["output"][0]["content"][0]["text"] == " Hello you"
    assert answer["store"] is False


async def test_metadata_is_repeated() -> None:
    assert (await ask(metadata={"run": "7"})).json()["metadata"] == {"run": "7"}


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "auto"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"moderation": {"model": "omni"}}, "moderation"),
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0]"),
        ({"input": ["Hi", {"role": "user"}]}, "input[0]"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "boss", "content": "Hi"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"tools": [CLOCK, {"type": "web_search"}]}, "tools[1]"),
        ({"tools": [{"name": "clock"}]}, "tools[0]"),
        ({"tools": [CLOCK], "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "clock"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": ALLOWED | {"tools": [WEATHER]}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": ALLOWED | {"tools": []}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"include": ["everything"]}, "include[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"input": "a " * 1500, "max_output_tokens": 1000}, "input"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_logprobs": 1000}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_done_is_told_by_the_field(
    body: Any, field: str, stream: bool
) -> None:
    engine = saying()
    answer = await ask(engine, **{"stream": stream} | body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert error["message"]
    assert not engine.requests


async def test_nothing_is_stored() -> None:
    async with client(saying()) as http:
        id = (await http.post(PATH, json={"input": "Hi"})).json()["id"]
        for method, path in [
            ("GET", f"{PATH}/{id}"),
            ("DELETE", f"{PATH}/{id}"),
            ("POST", f"{PATH}/{id}/cancel"),
            ("GET", f"{PATH}/{id}/input_items"),
        ]:
            answer = await http.request(method, path)
            assert answer.status_code == 404
            assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_full_server_and_a_missing_key_are_told_in_openais_shape() -> None:
    full = await ask(ScriptedEngine(permits=0))
    assert (full.status_code, full.json()["error"]["type"]) == (429, "rate_limit_error")
    async with client(saying(), api_key="k") as http:
        answer = await http.post(PATH, json={"input": "Hi"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
