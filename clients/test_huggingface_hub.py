"""`huggingface_hub.InferenceClient`: in .venv-clients the release that text-generation allows,
in .venv the one that transformers needs.
"""

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import OverloadedError, ValidationError
from jsonschema import validate

from clients.calling import Calls, sync_only
from clients.comparing import assert_equal_answers
from clients.wire import CITY, MESSAGES, PROMPT, TOOL, WEATHER, every_permit_taken


@pytest.fixture(params=["sync", "async"])
def client(request: pytest.FixtureRequest, url: str) -> Iterator[Any]:
    """A client of the bare URL, as its documentation says for a self-hosted server."""
    if request.param == "sync":
        yield Calls(InferenceClient(url, timeout=60), None)
    else:
        with asyncio.Runner() as runner:
            client = Calls(AsyncInferenceClient(url, timeout=60), runner)
            yield client
            with suppress(KeyError):  # the older release forgets a session twice
                client.close()


def told(value: Any) -> Any:
    """Convert to JSON, since the client's classes differ between streams and plain answers."""
    return json.loads(json.dumps(value))


def test_the_bare_url_repeats_the_prompt(client: Any) -> None:
    assert client.text_generation(PROMPT, max_new_tokens=2) == f"{PROMPT} Paris."


@sync_only
def test_full_text_is_left_out_when_asked(client: Any) -> None:
    answer = client.text_generation(PROMPT, max_new_tokens=2, return_full_text=False)
    assert answer == " Paris."


@sync_only
def test_the_url_of_a_route_does_not_repeat_the_prompt(client: Any, url: str) -> None:
    generate = f"{url}/generate"
    assert client.text_generation(PROMPT, max_new_tokens=2, model=generate) == " Paris."
    assert client.text_generation(PROMPT, max_new_tokens=2, model=generate, stream=False)


def test_details_are_those_of_the_text(client: Any) -> None:
    answer = client.text_generation(
        PROMPT, max_new_tokens=6, details=True, decoder_input_details=True, top_n_tokens=2
    )
    details = answer.details
    assert answer.generated_text == PROMPT + "".join(token.text for token in details.tokens)
    assert details.finish_reason == "length"
    assert details.generated_tokens == len(details.tokens) == len(details.top_tokens) == 6
    assert details.seed is None
    assert "".join(token.text for token in details.prefill) == PROMPT
    for token, best in zip(details.tokens, details.top_tokens, strict=True):
        assert best[0]["id"] == token.id  # greedy; the client leaves these as dicts
        assert best[0]["logprob"] == token.logprob >= best[1]["logprob"]


def test_streamed_text_joins_to_the_unstreamed_one(client: Any) -> None:
    plain = client.text_generation(PROMPT, max_new_tokens=10, return_full_text=False)
    assert "".join(client.text_generation(PROMPT, max_new_tokens=10, stream=True)) == plain


def test_line_breaks_of_unicode_arrive_in_a_stream(client: Any) -> None:
    text = "one\u2028two\u2029three\x85four\x0bfive"
    grammar = {"type": "regex", "value": text}
    streamed = client.text_generation(PROMPT, max_new_tokens=60, grammar=grammar, stream=True)
    assert "".join(streamed).removesuffix("<|im_end|>") == text


def test_streamed_details_agree_with_the_unstreamed_ones(client: Any) -> None:
    asked = {"max_new_tokens": 8, "seed": 11, "do_sample": True, "temperature": 1.3}
    plain = client.text_generation(PROMPT, details=True, **asked)
    streamed = client.text_generation(PROMPT, details=True, stream=True, **asked)
    assert_equal_answers(told([event.token for event in streamed]), told(plain.details.tokens))
    assert [event.index for event in streamed] == list(range(1, 9))
    assert all(event.generated_text is event.details is None for event in streamed[:-1])
    last = streamed[-1]
    assert last.generated_text == plain.generated_text
    assert last.details.seed == plain.details.seed == 11
    assert last.details.finish_reason == "length"
    assert last.details.input_length == 5


def test_best_of_two_returns_the_better_sequence(client: Any) -> None:
    answer = client.text_generation(
        PROMPT, max_new_tokens=4, best_of=2, do_sample=True, temperature=1.5, details=True
    )
    (other,) = answer.details.best_of_sequences
    assert other.seed != answer.details.seed


@sync_only
@pytest.mark.parametrize(
    "grammar",
    [{"type": "json", "value": CITY}, {"type": "json_schema", "value": {"schema": CITY}}],
    ids=["json", "json_schema"],
)
def test_a_grammar_makes_json_that_validates(client: Any, grammar: dict[str, Any]) -> None:
    asked = {"max_new_tokens": 40, "grammar": grammar, "return_full_text": False}
    text = client.text_generation("A city as JSON: ", **asked)
    validate(json.loads(text), CITY)


def test_an_invalid_request_is_a_validation_error(client: Any) -> None:
    for stream in (False, True):
        with pytest.raises(ValidationError) as refused:
            client.text_generation(PROMPT, temperature=-1.0, stream=stream)
        assert "`temperature` must be strictly positive" in str(refused.value)


def test_a_full_server_is_an_overloaded_error(client: Any, url: str) -> None:
    with every_permit_taken(url):
        for stream in (False, True):
            with pytest.raises(OverloadedError):
                client.text_generation(PROMPT, max_new_tokens=1, stream=stream)


def test_the_endpoint_returns_its_info_and_health(url: str) -> None:
    client = InferenceClient(url, provider="hf-inference")
    info = client.get_endpoint_info()
    assert info["router"] == "text-generation-router"
    assert info["max_total_tokens"] == 512
    assert client.health_check() is True


def test_a_chat_is_answered_with_its_usage(client: Any) -> None:
    answer = client.chat_completion(MESSAGES, max_tokens=6, temperature=0.0)
    (choice,) = answer.choices
    assert "Paris" in choice.message.content
    assert choice.message.role == "assistant"
    assert answer.model == "dummy"  # what this client sends for a URL is repeated
    usage = answer.usage
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens
    assert 1 <= usage.completion_tokens <= 6


def test_a_streamed_chat_joins_to_the_unstreamed_one(client: Any) -> None:
    asked = {"max_tokens": 6, "temperature": 0.0, "logprobs": True, "top_logprobs": 2}
    plain = client.chat_completion(MESSAGES, **asked)
    *chunks, last = client.chat_completion(
        MESSAGES, stream=True, stream_options={"include_usage": True}, **asked
    )
    first, *others = [chunk.choices[0].delta for chunk in chunks]
    said = "".join(delta.content for delta in (first, *others))
    assert said == plain.choices[0].message.content
    assert first.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == plain.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert told(last.usage) == told(plain.usage)
    told_by = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    entries = [entry for logprobs in told_by for entry in logprobs.content]
    assert_equal_answers(told(entries), told(plain.choices[0].logprobs.content))
    assert len(entries) == plain.usage.completion_tokens


def test_a_tool_is_called_with_arguments_that_validate(client: Any) -> None:
    asked = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60, "temperature": 0.0}
    answer = client.chat_completion(MESSAGES, **asked)
    (call,) = answer.choices[0].message.tool_calls
    assert call.id.startswith("call_")
    assert call.type == "function"
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    validate(arguments, WEATHER["parameters"])

    chunks = client.chat_completion(MESSAGES, stream=True, **asked)
    calls = [
        piece
        for chunk in chunks
        for choice in chunk.choices
        for piece in choice.delta.tool_calls or ()
    ]
    assert (calls[0].id is not None, calls[0].function.name) == (True, "get_weather")
    assert json.loads("".join(piece.function.arguments for piece in calls)) == arguments


@sync_only
@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}},
        {"type": "json", "value": CITY},
        {"type": "json_object", "value": CITY},
    ],
    ids=["openai", "json", "json_object"],
)
def test_a_response_format_makes_json_that_validates(
    client: Any, response_format: dict[str, Any]
) -> None:
    asked = {"max_tokens": 40, "temperature": 0.0, "response_format": response_format}
    plain = client.chat_completion(MESSAGES, **asked).choices[0].message.content
    validate(json.loads(plain), CITY)
    chunks = client.chat_completion(MESSAGES, stream=True, **asked)
    assert "".join(c.choices[0].delta.content for c in chunks if c.choices) == plain


@pytest.mark.parametrize("stream", [False, True])
def test_an_invalid_chat_returns_the_reason(client: Any, stream: bool) -> None:
    with pytest.raises(Exception, match=r"400|Bad request") as refused:
        client.chat_completion(MESSAGES, max_tokens=1, top_p=1.5, stream=stream)
    # The client raises an error of requests, httpx2 or aiohttp. Only aiohttp's has the payload.
    error: Any = refused.value
    payload = getattr(error, "response_error_payload", None) or error.response.json()
    assert payload["error"]["param"] == "top_p"
    assert payload["error"]["message"].startswith("Input validation error: `top_p` must be")
