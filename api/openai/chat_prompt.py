"""The translation of a chat to a generation.

The messages become a prompt, and the tools or the response format become a grammar.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from api.generation.request import GenerateRequest, GrammarType
from api.generation.validation import Extras
from api.http.errors import ToolError, ValidationError
from api.http.off_loop import READING
from api.http.serde import json_text
from api.openai.parameters import extras, generate_parameters
from api.openai.requests import ChatRequest, ImageChunk, Message, ResponseFormat, Tool
from api.openai.tools import (
    ANY_OBJECT,
    DEFAULT_PROMPT,
    function_json,
    offered_tools,
    template_tools,
    tool_grammar,
)

TemplateMessage = dict[str, str]
"""A message as chat templates take it: a `role` and a `content`."""


class ChatTokenizer(Protocol):
    """The part of the engine's tokenizer that renders chats."""

    @property
    def chat_uses_tools(self) -> bool: ...

    def render_chat(
        self, messages: Sequence[TemplateMessage], tools: Sequence[dict[str, Any]] | None = None
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat as a generation. If it `uses_tools`, the model generates the call of one."""

    request: GenerateRequest
    extras: Extras
    uses_tools: bool


async def prepare(tokenizer: ChatTokenizer, chat: ChatRequest) -> ChatPrompt:
    """Translate `chat`. Raises ToolError, ValidationError or TemplateError.

    The chat template runs in a thread.
    """
    format, any_schema = _format_grammar(chat.response_format)
    if format is not None and chat.tools:
        raise ToolError("Grammar and tools are mutually exclusive")
    tools = offered_tools(chat.tools or [], chat.tool_choice)
    prompt = await READING.run(_render, tokenizer, chat, tools)
    grammar = tool_grammar(tools) if tools else format
    parameters = generate_parameters(chat, top_n_tokens=chat.top_logprobs, grammar=grammar)
    return ChatPrompt(
        request=GenerateRequest(inputs=prompt, parameters=parameters),
        extras=extras(chat, add_special_tokens=False, any_schema=any_schema),
        uses_tools=bool(tools),
    )


async def prepare_without_tools(tokenizer: ChatTokenizer, chat: ChatRequest) -> ChatPrompt:
    """Translate `chat` again, after the model chose to answer in words."""
    return await prepare(tokenizer, chat.model_copy(update={"tools": None}))


def _format_grammar(format: ResponseFormat | None) -> tuple[GrammarType | None, bool]:
    """Return the grammar of a response format, and whether it may be any JSON schema.

    A schema in OpenAI's shape need not list properties, one in TGI's shape must.
    """
    if format is None or format.type == "text":
        return None, False
    if format.type == "json_schema" and format.json_schema is not None:
        schema = format.json_schema.schema_
        return GrammarType(type="json", value=ANY_OBJECT if schema is None else schema), True
    if format.type == "json_object" and format.value is None:
        return GrammarType(type="json", value=ANY_OBJECT), True
    return GrammarType(type=format.type, value=format.value), False


def _render(tokenizer: ChatTokenizer, chat: ChatRequest, tools: list[Tool]) -> str:
    """Render the prompt. If the template does not list tools, the last message does."""
    if not tools:
        return tokenizer.render_chat(_template_messages(chat.messages))
    described = template_tools(tools)
    listed = "" if tokenizer.chat_uses_tools else json_text(described) + "\n"
    appendix = f"\n---\n{listed}{chat.tool_prompt or DEFAULT_PROMPT}"
    return tokenizer.render_chat(_template_messages(chat.messages, appendix), described)


def _template_messages(messages: list[Message], appendix: str = "") -> list[TemplateMessage]:
    """Return the messages for the template, with `appendix` after the last one if it has content.

    Raises ValidationError for content that is not text.
    """
    rendered = [{"role": message.role, "content": _text(message)} for message in messages]
    if messages and not _has_only_calls(messages[-1]):
        rendered[-1]["content"] += appendix
    return rendered


def _has_only_calls(message: Message) -> bool:
    """Tell whether a message is its calls. If it has content too, TGI ignores the calls."""
    return not message.content and bool(message.tool_calls)


def _text(message: Message) -> str:
    content = message.content
    if _has_only_calls(message):
        return _calls_json(message)
    if content is None or isinstance(content, str):
        return content or ""
    if any(isinstance(chunk, ImageChunk) for chunk in content):
        raise ValidationError("image modality is not supported")
    return "".join(chunk.text for chunk in content if not isinstance(chunk, ImageChunk))


def _calls_json(message: Message) -> str:
    """Return the calls of a message as the JSON that TGI shows to templates."""
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
