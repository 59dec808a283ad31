"""Models and chats by the `openai` client, which knows nothing of TGI."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from jsonschema import validate

from clients.calling import in_version, sync_only
from clients.comparing import assert_equal_answers
from clients.wire import (
    CITY,
    MESSAGES,
    TOOL,
    WEATHER,
)

GREEDY = {"model": "tgi", "temperature": 0}
OTHER_TOOL = {"type": "function", "function": {"name": "get_time", "parameters": None}}


@pytest.fixture(params=["sync", "async"])
def client(request: pytest.FixtureRequest, url: str) -> Iterator[Any]:
    options = {"base_url": f"{url}/v1"}
    yield from in_version(request.param, openai.OpenAI, openai.AsyncOpenAI, **options)


def chat(client: Any, **asked: Any) -> Any:
    return client.chat.completions.create(**GREEDY | {"messages": MESSAGES} | asked)


def test_the_model_is_listed_by_the_name_that_info_gives(client: Any, url: str) -> None:
    served = httpx2.get(f"{url}/info").json()["model_id"]
    assert [(m.id, m.object, m.created, m.owned_by) for m in client.models.list()] == [
        (served, "model", 0, served)
    ]


def test_a_chat_is_answered_with_its_usage(client: Any) -> None:
    answer = chat(client, max_tokens=6)
    (choice,) = answer.choices
    assert "Paris" in choice.message.content
    assert choice.message.role == "assistant"
    assert choice.message.tool_calls is None
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint == "3.3.6-dev0-native"
    usage = answer.usage
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens
    assert 1 <= usage.completion_tokens <= 6


@sync_only
def test_the_model_is_the_served_one_or_the_name_asked_for(client: Any) -> None:
    (served,) = (model.id for model in client.models.list())
    assert chat(client, max_tokens=1).model == served
    assert chat(client, max_tokens=1, model="gpt-4o").model == "gpt-4o"


@sync_only
def test_a_chat_that_ends_by_itself_has_finish_reason_stop(client: Any) -> None:
    answer = chat(client, messages=[{"role": "user", "content": "Say OK."}], max_tokens=60)
    assert answer.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in answer.choices[0].message.content


@sync_only
def test_max_completion_tokens_limits_the_answer(client: Any) -> None:
    answer = chat(client, max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices == chat(client, max_tokens=3).choices


@sync_only
def test_stop_sequences_end_the_answer_and_are_cut_from_it(client: Any) -> None:
    asked = {"messages": [{"role": "user", "content": "Count from one to ten."}], "max_tokens": 24}
    free = chat(client, logprobs=True, **asked).choices[0]
    stop = free.logprobs.content[4].token
    stopped = chat(client, stop=[stop, "never said"], **asked).choices[0]
    assert stopped.finish_reason == "stop"
    assert stop not in stopped.message.content
    assert free.message.content.startswith(stopped.message.content + stop)


@sync_only
def test_a_stop_sequence_may_end_inside_a_token(client: Any) -> None:
    asked = {"messages": [{"role": "user", "content": "Count from one to ten."}], "max_tokens": 24}
    text = chat(client, **asked).choices[0].message.content
    stop = text[3:9]
    for stream in (False, True):
        answer = chat(client, stop=stop, stream=stream, **asked)
        if stream:
            said = "".join(c.choices[0].delta.content for c in answer)
        else:
            said = answer.choices[0].message.content
        assert said == text[: text.index(stop)]


@sync_only
def test_a_seed_repeats_the_answer_streamed_or_not(client: Any) -> None:
    asked = {"max_tokens": 8, "temperature": 1.5, "seed": 5}
    texts = [chat(client, **asked).choices[0].message.content for _ in range(2)]
    chunks = chat(client, stream=True, **asked)
    assert texts[0] == texts[1] == "".join(c.choices[0].delta.content for c in chunks)
    assert chat(client, **asked | {"seed": 6}).choices[0].message.content != texts[0]


def test_logprobs_belong_to_the_tokens_of_the_text(client: Any) -> None:
    answer = chat(client, max_tokens=3, logprobs=True, top_logprobs=3)
    (choice,) = answer.choices
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == choice.message.content
    assert len(entries) == answer.usage.completion_tokens == 3
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token
        best = entry.top_logprobs
        assert len(best) == 3
        assert best[0].logprob == entry.logprob  # greedy
        assert [x.logprob for x in best] == sorted((x.logprob for x in best), reverse=True)


@sync_only
def test_top_logprobs_are_empty_unless_asked_for(client: Any) -> None:
    entries = chat(client, max_tokens=2, logprobs=True).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in entries] == [[], []]
    assert chat(client, max_tokens=1).choices[0].logprobs is None


def test_a_streamed_chat_joins_to_the_unstreamed_one(client: Any) -> None:
    asked = {"max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    plain = chat(client, **asked)
    *chunks, last = chat(client, stream=True, stream_options={"include_usage": True}, **asked)
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.delta.content for choice in choices) == plain.choices[0].message.content
    assert [choice.delta.role for choice in choices] == ["assistant", *[None] * (len(choices) - 1)]
    assert [c.finish_reason for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1].finish_reason == plain.choices[0].finish_reason
    told = [choice.logprobs for choice in choices if choice.logprobs is not None]
    entries = [entry for logprobs in told for entry in logprobs.content]
    assert_equal_answers(
        [entry.model_dump() for entry in entries],
        [entry.model_dump() for entry in plain.choices[0].logprobs.content],
    )
    assert len(entries) == plain.usage.completion_tokens
    assert {chunk.usage for chunk in chunks} == {None}
    assert last.choices == []
    assert last.usage == plain.usage
    assert {chunk.id for chunk in chunks} == {last.id} != {plain.id}


def test_several_answers_are_the_same_streamed_or_not(client: Any) -> None:
    asked = {"n": 3, "max_tokens": 8, "temperature": 1.5, "seed": 5}
    answer = chat(client, **asked)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    assert texts[1] == chat(client, **asked | {"n": 1, "seed": 6}).choices[0].message.content
    assert answer.usage.completion_tokens <= 24
    streamed = ["", "", ""]
    for chunk in chat(client, stream=True, **asked):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content
    assert streamed == texts


@sync_only
def test_logprobs_are_the_models_own_whatever_is_sampled(client: Any) -> None:
    free = chat(client, max_tokens=1, logprobs=True, top_logprobs=20).choices[0]
    asked = {
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,
        "temperature": 0.3,
        "top_p": 0.5,
    }
    sampled = chat(client, seed=1, presence_penalty=1, **asked).choices[0]
    assert len(free.logprobs.content[0].top_logprobs) == 20
    assert_equal_answers(
        [top.model_dump() for top in sampled.logprobs.content[0].top_logprobs],
        [top.model_dump() for top in free.logprobs.content[0].top_logprobs],
    )


@sync_only
def test_a_stream_has_no_usage_unless_asked_for(client: Any) -> None:
    chunks = chat(client, stream=True, max_tokens=2)
    assert {len(chunk.choices) for chunk in chunks} == {1}
    assert {chunk.usage for chunk in chunks} == {None}


BY_NAME = {"type": "function", "function": {"name": "get_weather"}}
ALLOWED = {
    "type": "allowed_tools",
    "allowed_tools": {"mode": "required", "tools": [BY_NAME]},
}


@pytest.mark.parametrize(
    "choice",
    ["required", "get_weather", BY_NAME, ALLOWED],
    ids=["required", "name", "object", "allowed"],
)
def test_a_tool_is_called_the_same_streamed_or_not(client: Any, choice: Any) -> None:
    tools = [TOOL] if choice == "required" else [TOOL, OTHER_TOOL]
    asked = {"tools": tools, "tool_choice": choice, "max_tokens": 60}
    plain = chat(client, **asked)
    message = plain.choices[0].message
    assert plain.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    (call,) = message.tool_calls
    assert call.id.startswith("call_")
    assert (call.type, call.function.name) == ("function", "get_weather")
    validate(json.loads(call.function.arguments), WEATHER["parameters"])

    choices = [chunk.choices[0] for chunk in chat(client, stream=True, **asked)]
    assert [c.finish_reason for c in choices if c.finish_reason] == ["tool_calls"]
    first, *rest = [piece for c in choices for piece in c.delta.tool_calls or ()]
    assert (first.index, first.type, first.function.name) == (0, "function", "get_weather")
    assert first.function.arguments == ""
    assert {(piece.index, piece.id, piece.function.name) for piece in rest} == {(0, None, None)}
    arguments = "".join(piece.function.arguments for piece in rest)
    assert arguments == call.function.arguments


@sync_only
@pytest.mark.parametrize("max_tokens", [2, 12])
def test_a_call_cut_by_max_tokens_is_the_same_streamed_or_not(client: Any, max_tokens: int) -> None:
    asked = {"tools": [TOOL], "tool_choice": "required", "max_tokens": max_tokens}
    (plain,) = chat(client, **asked).choices
    assert plain.finish_reason == "length"
    *_, last = choices = [chunk.choices[0] for chunk in chat(client, stream=True, **asked)]
    assert last.finish_reason == "length"
    pieces = [piece for c in choices for piece in c.delta.tool_calls or ()]
    calls = plain.message.tool_calls or ()
    assert [call.function.name for call in calls] == [
        piece.function.name for piece in pieces if piece.id
    ]
    assert "".join(call.function.arguments for call in calls) == "".join(
        piece.function.arguments for piece in pieces
    )


@sync_only
def test_a_tool_made_from_a_nested_model_is_called(client: Any) -> None:
    """Its parameters have a reference at their root, and one is named as part of a call."""
    cities = {"enum": ["Paris", "Rome", "Oslo"]}
    place = {"type": "object", "properties": {"_name": cities}, "required": ["_name"]}
    parameters = {"$ref": "#/$defs/Place", "$defs": {"Place": place}}
    tool = {"type": "function", "function": {"name": "locate", "parameters": parameters}}
    answer = chat(client, tools=[tool, TOOL], tool_choice="locate", max_tokens=60)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "locate"
    validate(json.loads(call.function.arguments), parameters)


@sync_only
def test_an_answer_in_words_beside_tools_follows_the_response_format(client: Any) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    answer = chat(client, tools=[TOOL], response_format=schema, max_tokens=80)
    message = answer.choices[0].message
    if message.tool_calls:
        validate(json.loads(message.tool_calls[0].function.arguments), WEATHER["parameters"])
    else:
        validate(json.loads(message.content), CITY)


@sync_only
def test_tools_left_to_the_model_give_a_call_or_an_answer(client: Any) -> None:
    answer = chat(client, tools=[TOOL], max_tokens=80)
    message = answer.choices[0].message
    if message.tool_calls:
        validate(json.loads(message.tool_calls[0].function.arguments), WEATHER["parameters"])
    else:
        assert message.content


@sync_only
def test_tools_that_must_not_be_used_change_nothing(client: Any) -> None:
    plain = chat(client, max_tokens=5)
    answer = chat(client, max_tokens=5, tools=[TOOL], tool_choice="none")
    assert answer.choices[0].message.content == plain.choices[0].message.content


@sync_only
def test_the_model_reads_the_result_of_a_tool(client: Any) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    conversation = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "0", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "0", "content": "Sunny, 25 degrees"},
    ]
    answer = chat(client, messages=conversation, max_tokens=4)
    assert answer.usage.prompt_tokens > chat(client, max_tokens=1).usage.prompt_tokens
    assert answer.choices[0].message.content


@sync_only
def test_content_in_parts_is_joined(client: Any) -> None:
    text = MESSAGES[0]["content"]
    parts = [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]
    answer = chat(client, messages=[{"role": "user", "content": parts}], max_tokens=5)
    assert answer.choices == chat(client, max_tokens=5).choices


@sync_only
def test_an_unfinished_assistant_message_is_continued(client: Any) -> None:
    """The model continues the assistant's last message ([S] in section 6.3)."""
    begun = [*MESSAGES, {"role": "assistant", "content": "The capital of France is"}]
    answer = chat(client, messages=begun, max_tokens=3)
    assert answer.choices[0].message.content.startswith(" Paris")


@sync_only
@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "value": {"name": "city", "schema": CITY}},
        {"type": "json_object", "value": CITY},
    ],
    ids=["json_schema", "json_object"],
)
def test_a_response_format_in_tgis_form_makes_json_that_validates(
    client: Any, response_format: dict[str, Any]
) -> None:
    asked = {"max_tokens": 40, "response_format": response_format}
    answer = chat(client, **asked)
    validate(json.loads(answer.choices[0].message.content), CITY)
    assert answer.choices[0].finish_reason == "stop"
    chunks = chat(client, stream=True, **asked)
    streamed = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert streamed == answer.choices[0].message.content


@sync_only
def test_parameters_that_change_nothing_are_ignored(client: Any) -> None:
    plain = chat(client, max_tokens=4)
    answer = chat(client, max_tokens=4, user="me", metadata={"a": "b"}, store=False)
    assert answer.choices == plain.choices


def test_headers_agree_with_the_usage(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-")
    raw = client.chat.completions.with_raw_response.create(
        messages=MESSAGES, max_tokens=3, **GREEDY
    )
    usage = raw.parse().usage
    assert raw.headers["x-prompt-tokens"] == str(usage.prompt_tokens)
    assert raw.headers["x-generated-tokens"] == str(usage.completion_tokens)


def test_the_clients_own_accumulator_reads_the_stream(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-")
    asked = {"messages": [{"role": "user", "content": "Say OK."}], "max_tokens": 60} | GREEDY
    plain = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == plain.choices[0].message.content
    assert final.choices[0].finish_reason == plain.choices[0].finish_reason


def test_the_clients_own_accumulator_reads_the_call_of_a_tool(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-")
    parameters = {**CITY, "additionalProperties": False}
    function = {"name": "find", "parameters": parameters, "strict": True}
    strict = {"type": "function", "function": function}
    asked = {"messages": MESSAGES, "tools": [strict], "tool_choice": "required", "max_tokens": 60}
    with client.chat.completions.stream(**asked | GREEDY) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in events
    (call,) = final.choices[0].message.tool_calls
    assert call.function.name == "find"
    validate(call.function.parsed_arguments, parameters)
