"""The translation of a chat in OpenAI's dialect, or TGI's, to the common one."""

from pydantic import JsonValue

from api.chat.prompt import ANY_OBJECT
from api.chat.request import Chat, Message, PastCall, Tool
from api.generation.request import GrammarType
from api.http.errors import ToolError, ValidationError
from api.openai.parameters import extras, generate_parameters
from api.openai.requests import (
    ChatRequest,
    FunctionDefinition,
    ImageChunk,
    NamedTool,
    ResponseFormat,
)
from api.openai.requests import Message as WireMessage
from api.openai.requests import Tool as WireTool


def chat_of(body: ChatRequest) -> Chat:
    """Translate `body`. Raises ToolError or ValidationError."""
    grammar, any_schema = _format_grammar(body.response_format)
    tools, must_call = _callable_tools(body.tools or [], body.tool_choice)
    if grammar is not None and body.tools:
        raise ToolError("Grammar and tools are mutually exclusive")
    return Chat(
        messages=tuple(_message(message) for message in body.messages),
        parameters=generate_parameters(body, top_n_tokens=body.top_logprobs, grammar=grammar),
        extras=extras(body, add_special_tokens=False, any_schema=any_schema),
        tools=tuple(_tool(tool.function) for tool in tools),
        must_call=must_call,
        tool_prompt=body.tool_prompt,
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
    tools: list[WireTool], choice: str | NamedTool | None
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
        case str(name):
            return [_named(tools, name)], True


def _named(tools: list[WireTool], name: str) -> WireTool:
    for tool in tools:
        if tool.function.name == name:
            return tool
    raise ToolError(f"Tool with name {name} not found")


def _tool(function: FunctionDefinition) -> Tool:
    return Tool(function.name, function.description, function.arguments)


def _message(message: WireMessage) -> Message:
    return Message(
        role=message.role,
        text=_text(message),
        calls=tuple(_call(call.id, call.type, call.function) for call in message.tool_calls or ()),
    )


def _call(id: str, type: str, function: FunctionDefinition) -> PastCall:
    arguments: JsonValue = function.arguments
    return PastCall(id, function.name, arguments, type, function.description)


def _text(message: WireMessage) -> str:
    content = message.content
    if content is None or isinstance(content, str):
        return content or ""
    if any(isinstance(chunk, ImageChunk) for chunk in content):
        raise ValidationError("image modality is not supported")
    return "".join(chunk.text for chunk in content if not isinstance(chunk, ImageChunk))
