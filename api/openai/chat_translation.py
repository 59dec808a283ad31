"""The translation of a chat in OpenAI's dialect, or TGI's, to the common one."""

from collections.abc import Sequence
from dataclasses import replace

from api.chat.prompt import ANY_OBJECT
from api.chat.request import Chat, Message, PastCall, Tool
from api.generation.request import GrammarType
from api.http.errors import ToolError, ValidationError
from api.openai.parameters import check, check_range, extras, generate_parameters
from api.openai.requests import (
    AllowedToolsChoice,
    ChatRequest,
    Chunk,
    ImageChunk,
    NamedTool,
    RefusalChunk,
    ResponseFormat,
    ToolCall,
    ToolChoice,
)
from api.openai.requests import Message as WireMessage
from api.openai.requests import Tool as WireTool

_MAX_TOP_LOGPROBS = 20


def check_chat(body: ChatRequest, max_concurrent: int) -> None:
    """Raise ValidationError for a field that OpenAI's clients do not expect to be served.

    `max_concurrent` is the most generations that may run at once.
    """
    check(body, max_concurrent)
    check_range("top_logprobs", body.top_logprobs, 0, _MAX_TOP_LOGPROBS)
    if body.top_logprobs and not body.logprobs:
        raise ValidationError(
            "`top_logprobs` is only allowed when `logprobs` is true", field="top_logprobs"
        )
    if body.tool_choice not in (None, "auto", "none") and not body.tools:
        raise ValidationError(
            "`tool_choice` is only allowed when `tools` are given", field="tool_choice"
        )


def chat_of(body: ChatRequest) -> Chat:
    """Translate `body`. Raises ToolError or ValidationError."""
    grammar, any_schema = _format_grammar(body.response_format)
    tools, must_call = _callable_tools(body.tools or [], body.tool_choice)
    common = extras(body, add_special_tokens=False, any_schema=any_schema)
    return Chat(
        messages=tuple(_message(message) for message in body.messages),
        parameters=generate_parameters(body, top_n_tokens=body.top_logprobs, grammar=grammar),
        extras=replace(common, max_top_tokens=_MAX_TOP_LOGPROBS),
        tools=tuple(
            Tool(tool.function.name, tool.function.description, tool.function.arguments)
            for tool in tools
        ),
        must_call=must_call,
        tool_prompt=body.tool_prompt,
        n=body.n or 1,
        logprobs=bool(body.logprobs),
    )


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


def _callable_tools(
    tools: list[WireTool], choice: ToolChoice | None
) -> tuple[list[WireTool], bool]:
    """Return the tools that may be called, and whether one of them must be.

    Raises ToolError if `choice` names a tool that is not there.
    """
    if not tools:
        return [], False
    match choice:
        case "none":
            return [], False
        case "required":
            return tools, True
        case None | "auto":
            return tools, False
        case NamedTool(function=function):
            return [_named(tools, function.name)], True
        case AllowedToolsChoice(allowed_tools=allowed):
            named = [_named(tools, tool.function.name) for tool in allowed.tools]
            return named, allowed.mode == "required"
        case str(name):
            return [_named(tools, name)], True


def _named(tools: list[WireTool], name: str) -> WireTool:
    for tool in tools:
        if tool.function.name == name:
            return tool
    raise ToolError(f"Tool with name {name} not found", field="tool_choice")


def _message(message: WireMessage) -> Message:
    return Message(
        role=message.role,
        text=_text(message.content) or message.refusal or "",
        calls=tuple(_past_call(call) for call in message.tool_calls or ()),
        call_id=message.tool_call_id,
    )


def _past_call(call: ToolCall) -> PastCall:
    function = call.function
    return PastCall(call.id, function.name, function.arguments, call.type, function.description)


def _text(content: str | Sequence[Chunk] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(_chunk_text(chunk) for chunk in content)


def _chunk_text(chunk: Chunk) -> str:
    match chunk:
        case ImageChunk():
            raise ValidationError("image modality is not supported", field="messages")
        case RefusalChunk(refusal=text):
            return text
    return chunk.text
