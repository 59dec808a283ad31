"""The translation of a chat to a generation.

The messages become a prompt, and the tools a grammar. If the model may choose not to call a tool,
it is offered one more, which stands for an answer in words.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import JsonValue

from api.chat.request import Chat, Message, PastCall, Tool
from api.generation.request import GenerateRequest
from api.generation.validation import Extras
from api.http.errors import ToolError
from api.http.serde import json_text

TemplateMessage = dict[str, Any]
"""A message as chat templates take it: a `role` and a `content`."""

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

    def render_chat(
        self, messages: Sequence[TemplateMessage], tools: Sequence[dict[str, Any]] | None = None
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat as a generation.

    If it `is_call`, the model generates the call of a tool. `in_words` is the name of the tool that
    stands for an answer in words, or None if that may not be chosen.
    """

    request: GenerateRequest
    extras: Extras
    is_call: bool = False
    in_words: str | None = None


async def prepare(tokenizer: ChatTokenizer, chat: Chat) -> ChatPrompt:
    """Translate `chat`. Raises ToolError or TemplateError.

    The chat template runs in a thread.
    """
    if chat.tools and chat.parameters.grammar is not None:
        raise ToolError("Grammar and tools are mutually exclusive")
    in_words = None if chat.must_call or not chat.tools else _unused_name(chat.tools)
    tools = chat.tools if in_words is None else (*chat.tools, Tool(in_words, _IN_WORDS))
    calls = tuple((tool.name, _object_schema(tool)) for tool in tools)
    inputs = await asyncio.to_thread(_render, tokenizer, chat, tools)
    return ChatPrompt(
        request=GenerateRequest(inputs=inputs, parameters=chat.parameters),
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
        raise ToolError(f"The parameters of tool {tool.name} are not the JSON schema of an object")
    return {**schema, "type": "object"}


def _may_be_object(type: JsonValue) -> bool:
    return type == "object" or (isinstance(type, list) and "object" in type)


def _render(tokenizer: ChatTokenizer, chat: Chat, tools: Sequence[Tool]) -> str:
    """Render the prompt. If the template does not list tools, the last message does."""
    if not tools:
        return tokenizer.render_chat(_template_messages(chat.messages))
    described = _template_tools(tools)
    listed = "" if tokenizer.chat_uses_tools else json_text(described) + "\n"
    appendix = f"\n---\n{listed}{chat.tool_prompt or _DEFAULT_TOOL_PROMPT}"
    return tokenizer.render_chat(_template_messages(chat.messages, appendix), described)


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


def _template_messages(messages: Sequence[Message], appendix: str = "") -> list[TemplateMessage]:
    """Return the messages for the template, with `appendix` after the last one if it has text."""
    rendered = [{"role": message.role, "content": _content(message)} for message in messages]
    if messages and (messages[-1].text or not messages[-1].calls):
        rendered[-1]["content"] += appendix
    return rendered


def _content(message: Message) -> str:
    return message.text or (_calls_json(message.calls) if message.calls else "")


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
