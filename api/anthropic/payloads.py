"""The JSON of a message and of its content."""

import uuid
from typing import Any, Literal

import pydantic_core
from typing_extensions import TypedDict

from api.anthropic.requests import MessagesRequest
from api.chat.answer import ChatAnswer
from api.chat.events import Ended

StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class TextContent(TypedDict):
    type: Literal["text"]
    text: str


class ToolUse(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(TypedDict):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Stop(TypedDict):
    """Why an answer ended; None throughout before it has."""

    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageObject(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextContent | ToolUse]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(TypedDict):
    input_tokens: int


def begun_message(body: MessagesRequest, num_prompt_tokens: int) -> MessageObject:
    """Return the message as a stream begins with it."""
    return _message(
        body, [], {"stop_reason": None, "stop_sequence": None}, usage(num_prompt_tokens, 0)
    )


def complete_message(body: MessagesRequest, answer: ChatAnswer) -> MessageObject:
    assert answer.end is not None
    end = answer.end.finished
    counted = usage(end.num_prompt_tokens, end.num_generated_tokens)
    return _message(body, _content(answer), stop_of(answer.end, body.max_tokens), counted)


def usage(num_prompt_tokens: int, num_generated_tokens: int) -> MessageUsage:
    return {
        "input_tokens": num_prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": num_generated_tokens,
    }


def stop_of(end: Ended, max_tokens: int) -> Stop:
    """Tell why an answer ended. One that is shorter than `max_tokens` was cut because the model
    takes no more.
    """
    finished = end.finished
    if end.reason == "tool_calls":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if finished.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": finished.stop.string}
    if end.reason == "stop":
        return {"stop_reason": "end_turn", "stop_sequence": None}
    if finished.num_generated_tokens < max_tokens:
        return {"stop_reason": "model_context_window_exceeded", "stop_sequence": None}
    return {"stop_reason": "max_tokens", "stop_sequence": None}


def _message(
    body: MessagesRequest, content: list[TextContent | ToolUse], stop: Stop, counted: MessageUsage
) -> MessageObject:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": body.model,
        "content": content,
        **stop,
        "usage": counted,
    }


def _content(answer: ChatAnswer) -> list[TextContent | ToolUse]:
    call = answer.call
    if call is not None:
        input = _begun_object(call.arguments)
        return [{"type": "tool_use", "id": call.id, "name": call.name, "input": input}]
    return [{"type": "text", "text": answer.text}] if answer.text else []


def _begun_object(arguments: str) -> dict[str, Any]:
    """Return the arguments of a call. Of a call that was cut it is what can be read, as Anthropic's
    client reads them from a stream.
    """
    return pydantic_core.from_json(arguments, allow_partial=True) if arguments else {}
