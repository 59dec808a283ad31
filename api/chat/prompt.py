"""The translation of a chat to a generation.

The messages become a prompt, and the tools a grammar. If the model may choose not to call a tool,
it is offered one more, which stands for an answer in words.
"""

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import JsonValue

from api.chat.request import Chat, Message, PastCall, Tool
from api.generation.request import GenerateRequest
from api.generation.validation import Extras
from api.http.errors import ToolError
from api.http.serde import json_text

TemplateMessage = dict[str, Any]
"""A message as chat templates take it: a `role` and a `content`, and what else they know."""

ANY_OBJECT: dict[str, JsonValue] = {"type": "object"}
"""The JSON schema of an object with any properties."""

_EMPTY_OBJECT: dict[str, JsonValue] = {"type": "object", "additionalProperties": False}
_IN_WORDS = "Open ended response with no specific tool selected"
_DEFAULT_TOOL_PROMPT = (
    "\nGiven the functions available, please respond with a JSON for a function call with its "
    "proper arguments that best answers the given prompt. Respond in the format "
    "{name: function name, parameters: dictionary of argument name and its value}."
    "Do not use variables.\n"
)


class ChatTokenizer(Protocol):
    """The part of the engine's tokenizer that renders chats."""

    @property
    def chat_uses_tools(self) -> bool: ...

    def chat_mentions(self, word: str) -> bool: ...

    def render_chat(
        self, messages: Sequence[TemplateMessage], tools: Sequence[dict[str, Any]] | None = None
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat as a generation.

    If it `is_call`, the model generates the call of a tool, else a text. `in_words` is the name of
    the tool that stands for an answer in words, or None if that may not be chosen.
    """

    request: GenerateRequest
    extras: Extras
    is_call: bool = False
    in_words: str | None = None


async def prepare(tokenizer: ChatTokenizer, chat: Chat) -> ChatPrompt:
    """Translate `chat`. Raises ToolError or TemplateError.

    If there are tools, the grammar and the stop strings of the chat's parameters count for an
    answer in words only. The chat template runs in a thread.
    """
    in_words = None if chat.must_call or not chat.tools else _unused_name(chat.tools)
    tools = chat.tools if in_words is None else (*chat.tools, Tool(in_words, _IN_WORDS))
    calls = tuple((tool.name, _object_schema(tool)) for tool in tools)
    inputs = await asyncio.to_thread(_render, tokenizer, chat, tools)
    of_a_text: dict[str, object] = {"grammar": None, "stop": []} if tools else {}
    parameters = chat.parameters.model_copy(update=of_a_text)
    return ChatPrompt(
        request=GenerateRequest(inputs=inputs, parameters=parameters),
        extras=replace(chat.extras, calls=calls),
        is_call=bool(tools),
        in_words=in_words,
    )


async def prepare_in_words(tokenizer: ChatTokenizer, chat: Chat) -> ChatPrompt:
    """Translate `chat` again, after the model chose to answer in words."""
    return await prepare(tokenizer, replace(chat, tools=()))


def _unused_name(tools: Sequence[Tool]) -> str:
    name = "no_tool"
    while any(tool.name == name for tool in tools):
        name += "_"
    return name


def _object_schema(tool: Tool) -> dict[str, JsonValue]:
    """Return the schema of a tool's arguments, narrowed to objects.

    Raises ToolError if it is no schema of an object.
    """
    schema = tool.schema
    if schema is None:
        return _EMPTY_OBJECT
    if schema is True:
        return ANY_OBJECT
    if not isinstance(schema, dict) or not _may_be_object(schema.get("type", "object")):
        raise ToolError(
            f"The parameters of tool {tool.name} are not the JSON schema of an object",
            field="tools",
        )
    return {**schema, "type": "object"}


def _may_be_object(type: JsonValue) -> bool:
    return type == "object" or (isinstance(type, list) and "object" in type)


def _render(tokenizer: ChatTokenizer, chat: Chat, tools: Sequence[Tool]) -> str:
    """Render the prompt. If the template does not list tools, the last message does."""
    messages = _template_messages(tokenizer, chat.messages)
    if not tools:
        return tokenizer.render_chat(messages)
    described = _template_tools(tools)
    listed = "" if tokenizer.chat_uses_tools else json_text(described) + "\n"
    last = chat.messages[-1] if chat.messages else None
    if last is not None and (last.text or not last.calls):
        messages[-1]["content"] += f"\n---\n{listed}{chat.tool_prompt or _DEFAULT_TOOL_PROMPT}"
    return tokenizer.render_chat(messages, described)


def _template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Describe `tools` to a chat template as TGI does."""
    return [
        {
            "type": "function",
            "function": _function(
                tool.description, tool.name, ANY_OBJECT if tool.schema is None else tool.schema
            ),
        }
        for tool in tools
    ]


def _template_messages(
    tokenizer: ChatTokenizer, messages: Sequence[Message]
) -> list[TemplateMessage]:
    """Return the messages for the template. What it does not know is told in words it does."""
    knows_developers = tokenizer.chat_mentions("developer")
    knows_calls = tokenizer.chat_mentions("tool_calls")
    return [_template_message(message, knows_developers, knows_calls) for message in messages]


def _template_message(
    message: Message, knows_developers: bool, knows_calls: bool
) -> TemplateMessage:
    is_unknown = message.role == "developer" and not knows_developers
    rendered: TemplateMessage = {
        "role": "system" if is_unknown else message.role,
        "content": message.text,
    }
    if message.calls and knows_calls:
        rendered["tool_calls"] = [_template_call(call) for call in message.calls]
    elif message.calls:
        separator = "\n" if message.text else ""
        rendered["content"] += separator + _calls_json(message.calls)
    if message.call_id is not None:
        rendered["tool_call_id"] = message.call_id
    return rendered


def _template_call(call: PastCall) -> dict[str, Any]:
    """Return a call as templates expect it that know calls: with the arguments as an object."""
    arguments = call.arguments
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    return {
        "id": call.id,
        "type": call.type,
        "function": {"name": call.name, "arguments": arguments},
    }


def _calls_json(calls: Sequence[PastCall]) -> str:
    """Return the calls of a message as the JSON that TGI shows to templates."""
    return json_text(
        [
            {
                "id": call.id,
                "type": call.type,
                "function": _function(call.description, call.name, call.arguments),
            }
            for call in calls
        ]
    )


def _function(description: str | None, name: str, arguments: JsonValue) -> dict[str, Any]:
    """Return TGI's JSON of a function. Its `arguments` are encoded as a string of JSON, even if
    they are a string already.
    """
    return {"description": description, "name": name, "arguments": json_text(arguments)}
