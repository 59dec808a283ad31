"""The `openai` client's Responses against Skiff, with every answer checked against its types."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx2
import openai
import pytest
from jsonschema import validate
from pydantic import BaseModel

from clients.calling import in_version, sync_only
from clients.comparing import assert_equal_answers
from clients.wire import CITY, MESSAGES, WEATHER, every_permit_taken

QUESTION = MESSAGES[0]["content"]
TOOL = {"type": "function", "strict": True} | WEATHER
NAMED = {"type": "function", "name": "get_weather"}
SCHEMA_FORMAT = {"format": {"type": "json_schema", "name": "city", "schema": CITY}}


class City(BaseModel):
    name: Literal["Paris", "Rome", "Oslo"]
    capital: bool


def options(url: str) -> dict[str, Any]:
    return {
        "base_url": f"{url}/v1",
        "max_retries": 0,
        "api_key": "-",
        "_strict_response_validation": True,
    }


@pytest.fixture(params=["sync", "async"])
def client(request: pytest.FixtureRequest, url: str) -> Iterator[Any]:
    yield from in_version(request.param, openai.OpenAI, openai.AsyncOpenAI, **options(url))


def ask(client: Any, **asked: Any) -> Any:
    return client.responses.create(
        **{"model": "skiff", "temperature": 0, "input": QUESTION} | asked
    )


def test_a_text_is_answered(client: Any) -> None:
    answer = ask(client, max_output_tokens=24)
    assert "Paris" in answer.output_text
    assert (answer.object, answer.status, answer.error) == ("response", "completed", None)
    (item,) = answer.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert answer.usage.input_tokens + answer.usage.output_tokens == answer.usage.total_tokens
    assert answer.model == "skiff"


@sync_only
def test_it_is_the_answer_of_a_chat(client: Any) -> None:
    asked = {"model": "skiff", "temperature": 0, "messages": MESSAGES, "max_tokens": 16}
    chat = client.chat.completions.create(**asked)
    answer = ask(client, max_output_tokens=16)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == chat.usage.completion_tokens


@sync_only
def test_an_answer_that_is_cut_is_incomplete(client: Any) -> None:
    answer = ask(client, max_output_tokens=2)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == 2


@sync_only
def test_a_conversation_goes_on_with_the_output_of_the_last_answer(client: Any) -> None:
    conversation: list[Any] = [{"role": "user", "content": "My name is Ada. Say hello."}]
    first = ask(client, input=conversation, max_output_tokens=30)
    conversation += first.output
    conversation.append({"role": "user", "content": "What is my name?"})
    second = ask(
        client, input=conversation, instructions="Answer in one word.", max_output_tokens=12
    )
    assert second.output_text
    assert second.usage.input_tokens > first.usage.input_tokens
    assert second.instructions == "Answer in one word."


def test_the_events_of_a_stream_are_those_of_openai(client: Any) -> None:
    plain = ask(client, max_output_tokens=8)
    events = ask(client, max_output_tokens=8, stream=True)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    types = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert types == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{plain.status}",
    ]
    assert "".join(deltas) == plain.output_text
    assert events[-1].response.output_text == plain.output_text
    assert events[-1].response.usage == plain.usage


def test_the_clients_own_accumulator_reads_the_stream(url: str) -> None:
    client = openai.OpenAI(**options(url))
    asked = {"model": "skiff", "input": QUESTION, "temperature": 0, "max_output_tokens": 24}
    plain = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        snapshots = [
            event.snapshot for event in stream if event.type == "response.output_text.delta"
        ]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == plain.output_text
    assert final.usage == plain.usage


@pytest.mark.parametrize(
    "choice",
    ["required", NAMED, {"type": "allowed_tools", "mode": "required", "tools": [NAMED]}],
    ids=["required", "named", "allowed"],
)
def test_a_tool_is_called_the_same_streamed_or_not(client: Any, choice: Any) -> None:
    asked = {"tools": [TOOL], "tool_choice": choice, "max_output_tokens": 60}
    (call,) = ask(client, **asked).output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    validate(json.loads(call.arguments), WEATHER["parameters"])
    events = ask(client, stream=True, **asked)
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    (done,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done.arguments == call.arguments
    assert events[-1].response.output[0].arguments == call.arguments


@sync_only
def test_the_model_reads_the_result_of_a_tool(client: Any) -> None:
    conversation: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    asked = {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 60}
    first = ask(client, input=conversation, **asked)
    (call,) = first.output
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain, 7 degrees"}
    conversation += [call, output]
    answer = ask(client, input=conversation, max_output_tokens=24)
    assert answer.output_text


@sync_only
def test_tools_left_to_the_model_give_a_call_or_an_answer(client: Any) -> None:
    for stream in (False, True):
        answer = ask(client, tools=[TOOL], max_output_tokens=80, stream=stream)
        response = answer[-1].response if stream else answer
        (item,) = response.output
        assert item.type in ("function_call", "message")


@sync_only
def test_a_format_makes_json_that_validates(client: Any) -> None:
    answer = ask(client, text=SCHEMA_FORMAT, max_output_tokens=40)
    validate(json.loads(answer.output_text), CITY)
    events = ask(client, text=SCHEMA_FORMAT, max_output_tokens=40, stream=True)
    assert events[-1].response.output_text == answer.output_text


def test_the_client_parses_an_answer_into_a_model(url: str) -> None:
    client = openai.OpenAI(**options(url))
    answer = client.responses.parse(
        model="skiff", input=QUESTION, temperature=0, text_format=City, max_output_tokens=40
    )
    assert isinstance(answer.output_parsed, City)


@sync_only
def test_any_json_object_can_be_asked_for(client: Any) -> None:
    asked = {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 60}
    assert ask(client, **asked).output_text.lstrip().startswith("{")


@sync_only
def test_logprobs_belong_to_the_tokens_of_the_text(client: Any) -> None:
    asked = {
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 3,
        "max_output_tokens": 3,
    }
    answer = ask(client, **asked)
    entries = answer.output[0].content[0].logprobs
    assert "".join(entry.token for entry in entries) == answer.output_text
    assert [len(entry.top_logprobs) for entry in entries] == [3, 3, 3]
    events = ask(client, stream=True, **asked)
    streamed = [
        {key: entry.model_dump()[key] for key in ("token", "logprob")}
        for event in events
        if event.type == "response.output_text.delta"
        for entry in event.logprobs
    ]
    plain = [{"token": entry.token, "logprob": entry.logprob} for entry in entries]
    assert_equal_answers(streamed, plain)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tool_choice": NAMED}, "tool_choice"),
        ({"temperature": -1}, "temperature"),
        ({"input": "word " * 600}, "input"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_a_bad_request_that_names_the_field(
    client: Any, asked: dict[str, Any], field: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, stream=stream, **asked)
        assert refused.value.param == field
        assert refused.value.type == "invalid_request_error"


def test_a_full_server_is_a_rate_limit(client: Any, url: str) -> None:
    with every_permit_taken(url):
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError):
                ask(client, stream=stream)


@sync_only
def test_nothing_is_stored(client: Any) -> None:
    answer = ask(client, max_output_tokens=1)
    assert answer.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel(answer.id)


@sync_only
def test_the_model_is_found_by_its_name(client: Any) -> None:
    (listed,) = client.models.list()
    assert client.models.retrieve(listed.id) == listed
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-4o")
    assert missing.value.code == "model_not_found"


@sync_only
def test_embeddings_are_not_served(client: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="skiff", input="text")


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/api/chat"), ("GET", "/api/tags"), ("POST", "/api/generate"), ("GET", "/version")],
)
def test_routes_of_other_servers_are_not_found(url: str, method: str, path: str) -> None:
    assert httpx2.request(method, f"{url}{path}").status_code == 404
