"""A chat's messages become what a chat template takes: a role and a text each."""

import uuid
from typing import Any

from api.http.errors import ValidationError
from api.http.serde import json_text
from api.openai.requests import FunctionDefinition, ImageChunk, Message

TemplateMessage = dict[str, str]


def template_messages(messages: list[Message], appendix: str = "") -> list[TemplateMessage]:
    """`appendix` is put behind the last message, if it has content.

    Raises ValidationError for what is not text.
    """
    rendered = [{"role": message.role, "content": _text(message)} for message in messages]
    if messages and not _is_calls(messages[-1]):
        rendered[-1]["content"] += appendix
    return rendered


def next_call_id(messages: list[Message]) -> str:
    """One more than the highest id of a call so far; a UUID where one is no number."""
    ids = [call.id for message in messages for call in message.tool_calls or ()]
    if not all(id.isascii() and id.isdigit() for id in ids):
        return str(uuid.uuid4())
    return str(max((int(id) + 1 for id in ids), default=0))


def function_json(function: FunctionDefinition, arguments: object) -> dict[str, Any]:
    """TGI writes arguments as a string of JSON, even those that were a string already."""
    return {
        "description": function.description,
        "name": function.name,
        "arguments": json_text(arguments),
    }


def _is_calls(message: Message) -> bool:
    """With content besides, the content is all that TGI takes."""
    return not message.content and bool(message.tool_calls)


def _text(message: Message) -> str:
    content = message.content
    if _is_calls(message):
        return _flattened(message)
    if content is None or isinstance(content, str):
        return content or ""
    if any(isinstance(chunk, ImageChunk) for chunk in content):
        raise ValidationError("image modality is not supported")
    return "".join(chunk.text for chunk in content if not isinstance(chunk, ImageChunk))


def _flattened(message: Message) -> str:
    """As TGI has templates see calls: as their JSON."""
    return json_text(
        [
            {
                "id": call.id,
                "type": call.type,
                "function": function_json(call.function, call.function.arguments),
            }
            for call in message.tool_calls or ()
        ]
    )
