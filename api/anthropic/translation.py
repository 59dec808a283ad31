"""The translation of a body of the Messages API to a chat."""

from collections.abc import Iterator

from api.anthropic.requests import (
    MessageParam,
    MessagesRequest,
    PromptRequest,
    TextBlock,
    Texts,
    ToolResultBlock,
    ToolUseBlock,
)
from api.chat.request import Chat, Message, PastCall, Tool
from api.generation.request import GenerateParameters, GrammarType
from api.generation.validation import Extras
from api.http.errors import ValidationError

_BREAK = "\n"
"""Stands between the text blocks of one message, as in vLLM."""
_UNSUPPORTED_CODES = {"thread": "thread_unsupported_request"}
"""The codes that make Anthropic's client do without a field."""


def chat_of(body: MessagesRequest) -> Chat:
    """Translate `body`. Raises ValidationError."""
    for field in body.unsupported:
        if getattr(body, field):
            raise ValidationError(
                f"`{field}` is not supported", field=field, code=_UNSUPPORTED_CODES.get(field)
            )
    return _chat(body, _parameters(body))


def prompt_of(body: PromptRequest) -> Chat:
    """Return the chat that has the prompt of `body`. Raises ValidationError."""
    return _chat(body, GenerateParameters())


def _chat(body: PromptRequest, parameters: GenerateParameters) -> Chat:
    tools, must_call = _callable_tools(body)
    return Chat(
        messages=tuple(_messages(body)),
        parameters=parameters,
        extras=Extras(add_special_tokens=False, any_schema=True),
        tools=tools,
        must_call=must_call,
    )


def _parameters(body: MessagesRequest) -> GenerateParameters:
    """Return how to generate. A temperature or a `top_p` of 0 means greedy decoding."""
    greedy = body.temperature == 0.0 or body.top_p == 0.0
    return GenerateParameters(
        temperature=None if greedy else body.temperature,
        top_k=body.top_k or None,
        top_p=None if greedy or body.top_p == 1.0 else body.top_p,
        do_sample=not greedy,
        max_new_tokens=body.max_tokens,
        stop=body.stop_sequences or [],
        grammar=_grammar(body),
    )


def _grammar(body: MessagesRequest) -> GrammarType | None:
    format = None if body.output_config is None else body.output_config.format
    return None if format is None else GrammarType(type="json", value=format.schema_)


def _callable_tools(body: PromptRequest) -> tuple[tuple[Tool, ...], bool]:
    """Return the tools that may be called, and whether one of them must be."""
    choice = body.tool_choice
    tools = tuple(Tool(tool.name, tool.description, tool.input_schema) for tool in body.tools or ())
    if choice is None or choice.type == "auto":
        return tools, False
    if choice.type == "none":
        return (), False
    if choice.type == "tool":
        tools = tuple(tool for tool in tools if tool.name == choice.name)
    if not tools:
        text = "there is no tool to call" if choice.type == "any" else f"no tool {choice.name}"
        raise ValidationError(text, field="tool_choice")
    return tools, True


def _messages(body: PromptRequest) -> Iterator[Message]:
    if body.system:
        yield Message("system", _text(body.system))
    for message in body.messages:
        yield from _turns(message)


def _turns(message: MessageParam) -> Iterator[Message]:
    """Yield the results of tools that `message` has, each as a message, then what else it has."""
    blocks = message.content
    if isinstance(blocks, str):
        yield Message(message.role, blocks)
        return
    results = [block for block in blocks if isinstance(block, ToolResultBlock)]
    for result in results:
        text = _text(result.content)
        yield Message("tool", f"Error: {text}" if result.is_error else text, (), result.tool_use_id)
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    calls = tuple(
        PastCall(block.id, block.name, block.input)
        for block in blocks
        if isinstance(block, ToolUseBlock)
    )
    if texts or calls or not results:
        yield Message(message.role, _BREAK.join(texts), calls)


def _text(content: Texts) -> str:
    if isinstance(content, str):
        return content
    return _BREAK.join(block.text for block in content)
