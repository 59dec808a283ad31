"""The translation of a body of `/v1/responses` to a chat."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import takewhile

from api.chat.prompt import ANY_OBJECT
from api.chat.request import Chat, Message, PastCall, Tool
from api.generation.request import GrammarType
from api.http.errors import ValidationError
from api.openai.parameters import check, check_range, extras, generate_parameters
from api.openai.requests import OpenAIRequest
from api.responses.requests import (
    CallItem,
    CallOutputItem,
    Content,
    FunctionTool,
    Item,
    MessageItem,
    ResponsesRequest,
    SchemaFormat,
    TextConfig,
    TextPart,
    ToolChoiceAllowed,
    ToolChoiceFunction,
)

_TEXT_BREAK = "\n"
"""Stands between the parts of one message, as in vLLM."""
_SYSTEM_BREAK = "\n\n"
_SYSTEM_ROLES = ("system", "developer")
_MAX_TOP_LOGPROBS = 20


def chat_of(body: ResponsesRequest) -> Chat:
    """Translate `body`. Raises ValidationError."""
    for field in body.unsupported:
        if getattr(body, field):
            raise ValidationError(
                f"`{field}` is not supported", field=field, code="unsupported_parameter"
            )
    common = OpenAIRequest(
        max_tokens=body.max_output_tokens, temperature=body.temperature, top_p=body.top_p
    )
    check(common, max_concurrent=1)
    check_range("top_logprobs", body.top_logprobs, 0, _MAX_TOP_LOGPROBS)
    tools, must_call = _callable_tools(body)
    return Chat(
        messages=_messages(body),
        parameters=generate_parameters(
            common, top_n_tokens=body.top_logprobs, grammar=_grammar(body.text)
        ),
        extras=replace(
            extras(common, add_special_tokens=False, any_schema=True),
            max_top_tokens=_MAX_TOP_LOGPROBS,
        ),
        tools=tuple(Tool(tool.name, tool.description, tool.parameters) for tool in tools),
        must_call=must_call,
        logprobs=body.has_logprobs,
    )


def _grammar(text: TextConfig | None) -> GrammarType | None:
    format = None if text is None else text.format
    if format is None or format.type == "text":
        return None
    schema = format.schema_ if isinstance(format, SchemaFormat) else ANY_OBJECT
    return GrammarType(type="json", value=schema)


def _callable_tools(body: ResponsesRequest) -> tuple[list[FunctionTool], bool]:
    """Return the tools that may be called, and whether one of them must be."""
    tools = body.tools or []
    match body.tool_choice:
        case "none":
            return [], False
        case None | "auto":
            return tools, False
        case "required":
            return _named(tools, [tool.name for tool in tools]), True
        case ToolChoiceFunction(name=name):
            return _named(tools, [name]), True
        case ToolChoiceAllowed(mode=mode, tools=allowed):
            return _named(tools, [tool.name for tool in allowed]), mode == "required"


def _named(tools: list[FunctionTool], names: list[str]) -> list[FunctionTool]:
    """Return the tools with these names, of which there must be one at least, and all."""
    missing = set(names) - {tool.name for tool in tools}
    if missing or not names:
        text = f"Tool with name {min(missing)} not found" if missing else "there is no tool to call"
        raise ValidationError(text, field="tool_choice")
    return [tool for tool in tools if tool.name in names]


def _messages(body: ResponsesRequest) -> tuple[Message, ...]:
    """Return the messages, with all that comes before the first turn as one system message, since
    many templates take only one.
    """
    given = [Message("system", body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        given.append(Message("user", body.input))
    else:
        given += _turns(body.input)
    first = list(takewhile(lambda message: message.role in _SYSTEM_ROLES, given))
    if len(first) < 2:
        return tuple(given)
    system = _SYSTEM_BREAK.join(message.text for message in first)
    return (Message(first[0].role, system), *given[len(first) :])


def _turns(items: Iterable[Item]) -> list[Message]:
    """Return a message for each item, but one for a message of the assistant and the calls that
    follow it.
    """
    turns: list[Message] = []
    for item in items:
        match item:
            case MessageItem(role=role):
                turns.append(Message(role, _text(item.content)))
            case CallItem():
                turns.append(_with_call(turns, item))
            case CallOutputItem():
                turns.append(Message("tool", _text(item.output), call_id=item.call_id))
    return turns


def _with_call(turns: list[Message], item: CallItem) -> Message:
    """Return the assistant's message with one more call, and take it from the end of `turns` if it
    was there already.
    """
    call = PastCall(item.call_id, item.name, item.arguments)
    if not turns or turns[-1].role != "assistant":
        return Message("assistant", "", (call,))
    last = turns.pop()
    return Message("assistant", last.text, (*last.calls, call))


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    return _TEXT_BREAK.join(
        part.text if isinstance(part, TextPart) else part.refusal for part in content
    )
