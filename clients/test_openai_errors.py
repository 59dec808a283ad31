"""What the `openai` client gets for requests that are refused or ignored in part."""

from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from clients.calling import in_version, sync_only
from clients.wire import (
    CITY,
    MESSAGES,
    PROMPT,
    TOOL,
    every_permit_taken,
    name_of,
)

GREEDY = {"model": "tgi", "temperature": 0}


@pytest.fixture(params=["sync", "async"])
def client(request: pytest.FixtureRequest, url: str) -> Iterator[Any]:
    options = {"base_url": f"{url}/v1"}
    yield from in_version(request.param, openai.OpenAI, openai.AsyncOpenAI, **options)


def chat(client: Any, **asked: Any) -> Any:
    return client.chat.completions.create(**GREEDY | {"messages": MESSAGES} | asked)


REFUSED_BY_VALIDATION = [
    ({"top_p": 1.5}, "top_p", "`top_p` must be >= 0.0 and <= 1.0. Given: 1.5"),
    ({"max_tokens": 0}, "max_tokens", "`max_new_tokens` must be strictly positive"),
    (
        {"top_logprobs": 21, "logprobs": True},
        "top_logprobs",
        "`top_logprobs` must be >= 0 and <= 20. Given: 21",
    ),
    (
        {"presence_penalty": -2.1},
        "presence_penalty",
        "`presence_penalty` must be >= -2.0 and <= 2.0",
    ),
    ({"logit_bias": {"7": 101}}, "logit_bias", "`logit_bias` must be >= -100.0 and <= 100.0"),
]


@pytest.mark.parametrize(("asked", "param", "told"), REFUSED_BY_VALIDATION, ids=name_of)
def test_an_invalid_request_is_a_bad_request_that_names_the_field(
    client: Any, asked: dict[str, Any], param: str, told: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, stream=stream, **asked)
        error = refused.value
        assert told in error.message
        assert (error.type, error.param, error.code) == ("invalid_request_error", param, None)


@sync_only
def test_a_prompt_that_is_too_long_has_openais_code(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, messages=[{"role": "user", "content": "word " * 600}])
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "messages"


TAKEN_AS_OPENAI_MEANS_IT = [
    {"stop": "x"},
    {"top_p": 1},
    {"logit_bias": {"42": -100}},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}},
    {"max_tokens": 1, "max_completion_tokens": 2},
    {"presence_penalty": 0.5},
    {"tools": []},
    {"parallel_tool_calls": False, "tools": [TOOL], "tool_choice": "none"},
    {"messages": [{"role": "developer", "content": "Be brief."}, *MESSAGES]},
    {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
]
"""TGI refuses these values or gives them another meaning."""


@pytest.mark.parametrize("asked", TAKEN_AS_OPENAI_MEANS_IT, ids=str)
def test_values_that_openais_client_may_send_are_accepted(
    client: Any, asked: dict[str, Any]
) -> None:
    answer = chat(client, **{"max_tokens": 2} | asked)
    assert answer.choices[0].message.content is not None
    assert answer.usage.completion_tokens <= 2


REFUSED_BY_SHAPE = [
    ({"stop": 3}, "stop", "stop: invalid type: integer `3`, expected a sequence"),
    (
        {"response_format": {"type": "xml"}},
        "response_format.type",
        "response_format: unknown variant `xml`",
    ),
    (
        {"messages": [{"role": "user"}]},
        "messages[0]",
        "messages[0]: data did not match any variant of",
    ),
]


@pytest.mark.parametrize(("asked", "param", "told"), REFUSED_BY_SHAPE, ids=name_of)
def test_a_body_of_another_shape_is_a_bad_request_that_names_the_field(
    client: Any, asked: dict[str, Any], param: str, told: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, stream=stream, **asked)
        assert told in refused.value.message
        assert refused.value.param == param


def test_a_body_that_is_not_json_is_a_bad_request_in_openais_shape(url: str) -> None:
    headers = {"content-type": "application/json"}
    refused = httpx2.post(f"{url}/v1/completions", content=b"{", headers=headers)
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "invalid_request_error"


@sync_only
def test_a_route_that_is_not_served_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.embeddings.create(model="tgi", input="x")
    assert refused.value.type == "invalid_request_error"


def test_a_tool_that_does_not_exist_is_a_bad_request(client: Any) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, tools=[TOOL], tool_choice="get_news", stream=stream)
        assert "Tool with name get_news not found" in refused.value.message
        assert refused.value.param == "tool_choice"


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        ({"suffix": "!"}, "suffix", "unsupported_parameter"),
        ({"prompt": ["x"] * 5}, "prompt", None),
        ({"prompt": ""}, "prompt", None),
        ({"prompt": [49152]}, "prompt", None),
        ({"n": 33}, "n", None),
        ({"logprobs": 6}, "logprobs", None),
    ],
    ids=str,
)
def test_an_invalid_completion_is_a_bad_request_that_names_the_field(
    client: Any, asked: dict[str, Any], param: str, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**GREEDY | {"prompt": PROMPT, "max_tokens": 1} | asked)
    assert (refused.value.param, refused.value.code) == (param, code)


def test_a_full_server_is_a_rate_limit(client: Any, url: str) -> None:
    with every_permit_taken(url):
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as refused:
                chat(client, max_tokens=1, stream=stream)
            assert refused.value.type == "rate_limit_error"
            assert refused.value.code == "rate_limit_exceeded"
