"""A chat becomes a generation: its messages a prompt, its tools or its format a grammar."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from api.generation.request import GenerateRequest, GrammarType
from api.generation.validation import Extras
from api.http.errors import ToolError
from api.http.serde import json_text
from api.openai.messages import template_messages
from api.openai.parameters import extras, format_grammar, generate_parameters
from api.openai.requests import ChatRequest, Tool
from api.openai.tools import (
    DEFAULT_PROMPT,
    offered,
    template_tools,
    tool_grammar,
)


class ChatTokenizer(Protocol):
    """What the engine's tokenizer knows of chats."""

    @property
    def chat_uses_tools(self) -> bool: ...

    def render_chat(
        self, messages: Sequence[dict[str, str]], tools: Sequence[dict[str, Any]] | None = None
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What the engine is asked. With `uses_tools`, a call of one is what it generates."""

    request: GenerateRequest
    extras: Extras
    uses_tools: bool


async def prepare(tokenizer: ChatTokenizer, chat: ChatRequest) -> ChatPrompt:
    """Renders in a thread. Raises ToolError, ValidationError, TemplateError."""
    format, any_schema = format_grammar(chat.response_format)
    if format is not None and chat.tools:
        raise ToolError("Grammar and tools are mutually exclusive")
    tools = offered(chat.tools or [], chat.tool_choice)
    grammar = tool_grammar(tools) if tools else format
    return ChatPrompt(
        request=_request(chat, await asyncio.to_thread(_render, tokenizer, chat, tools), grammar),
        extras=extras(chat, add_special_tokens=False, any_schema=any_schema),
        uses_tools=bool(tools),
    )


async def prepare_without_tools(tokenizer: ChatTokenizer, chat: ChatRequest) -> ChatPrompt:
    """The same chat again, where the model chose to answer in words."""
    return await prepare(tokenizer, chat.model_copy(update={"tools": None}))


def _request(chat: ChatRequest, prompt: str, grammar: GrammarType | None) -> GenerateRequest:
    parameters = generate_parameters(chat, top_n_tokens=chat.top_logprobs, grammar=grammar)
    return GenerateRequest(inputs=prompt, parameters=parameters)


def _render(tokenizer: ChatTokenizer, chat: ChatRequest, tools: list[Tool]) -> str:
    """A template that knows no tools has them told in the last message."""
    if not tools:
        return tokenizer.render_chat(template_messages(chat.messages))
    described = template_tools(tools)
    listed = "" if tokenizer.chat_uses_tools else json_text(described) + "\n"
    appendix = f"\n---\n{listed}{chat.tool_prompt or DEFAULT_PROMPT}"
    return tokenizer.render_chat(template_messages(chat.messages, appendix), described)
