"""`langchain-huggingface` with a self-hosted URL: without the hub, a token or torch."""

import asyncio
import sys
from typing import Any

import pytest
from jsonschema import validate
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint

from clients.wire import PROMPT, TOOL, WEATHER


def endpoint(url: str, **options: Any) -> HuggingFaceEndpoint:
    """Return an endpoint. By default it samples (temperature 0.8, top_k 10, top_p 0.95), so tests
    give a seed.
    """
    return HuggingFaceEndpoint(endpoint_url=url, **{"max_new_tokens": 8, "seed": 3} | options)


@pytest.fixture
def llm(url: str) -> HuggingFaceEndpoint:
    return endpoint(url)


@pytest.fixture
def chat(url: str) -> ChatHuggingFace:
    """A chat model with a seed, so that its answers are repeatable."""
    return ChatHuggingFace(llm=endpoint(url), temperature=0.01)


def test_an_answer_is_the_text_without_the_prompt(llm: HuggingFaceEndpoint) -> None:
    text = llm.invoke(PROMPT)
    assert text
    assert PROMPT not in text
    assert llm.invoke(PROMPT) == text
    assert asyncio.run(llm.ainvoke(PROMPT)) == text


def test_a_stream_joins_to_the_answer(llm: HuggingFaceEndpoint) -> None:
    async def streamed() -> list[str]:
        return [piece async for piece in llm.astream(PROMPT)]

    pieces = list(llm.stream(PROMPT))
    assert len(pieces) > 1
    assert "".join(pieces) == llm.invoke(PROMPT)
    assert asyncio.run(streamed()) == pieces


def test_greedy_parameters_reach_the_server(url: str) -> None:
    greedy = endpoint(url, temperature=None, top_k=None, top_p=None, typical_p=None, seed=None)
    assert greedy.invoke(PROMPT).startswith(" Paris.")


def test_a_stop_sequence_is_cut_from_the_answer(url: str) -> None:
    greedy = endpoint(url, temperature=None, top_k=None, top_p=None, typical_p=None, seed=None)
    assert greedy.invoke(PROMPT, stop=["."]) == " Paris"
    assert "".join(greedy.stream(PROMPT, stop=["."])) == " Paris"


def test_several_prompts_are_answered_in_order(llm: HuggingFaceEndpoint) -> None:
    prompts = [PROMPT, "One, two, three,"]
    assert llm.batch(prompts) == [llm.invoke(prompt) for prompt in prompts]


MESSAGES = [SystemMessage("Answer in one word."), HumanMessage("What is the capital of France?")]


def test_a_chat_is_answered_with_its_usage(chat: ChatHuggingFace) -> None:
    answer = chat.invoke(MESSAGES)
    usage = answer.usage_metadata
    assert isinstance(answer, AIMessage)
    assert answer.content
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
    assert 1 <= usage["output_tokens"] <= 8
    assert answer.response_metadata["finish_reason"] in ("length", "stop")
    assert asyncio.run(chat.ainvoke(MESSAGES)).content == answer.content


def test_a_streamed_chat_joins_to_the_unstreamed_one(chat: ChatHuggingFace) -> None:
    chunks = list(chat.stream(MESSAGES, stream_usage=True))
    plain = chat.invoke(MESSAGES)
    assert "".join(chunk.content for chunk in chunks) == plain.content
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.usage_metadata["total_tokens"] == plain.usage_metadata["total_tokens"]


def test_a_bound_tool_is_called_with_arguments_that_validate(url: str) -> None:
    chat = ChatHuggingFace(llm=endpoint(url, max_new_tokens=60), temperature=0.01)
    answer = chat.bind_tools([TOOL], tool_choice="required").invoke(MESSAGES)
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather"
    validate(call["args"], WEATHER["parameters"])


def test_langchain_does_not_import_torch() -> None:
    assert "torch" not in sys.modules
    assert "transformers" not in sys.modules
