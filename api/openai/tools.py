"""Tools: the offered ones, the grammar that makes the model call one, and the call it made.

The model generates `{"function": {"_name": "f", "a": 1}}`. The name is a property of its own and
comes first, so that a stream can tell early which tool is called. If the model may choose not to
call a tool, it is offered one more, `no_tool`, which stands for an answer in words.
"""

import re
import uuid
from typing import Any, NamedTuple

import orjson
import pydantic_core
from pydantic import JsonValue

from api.generation.request import GrammarType
from api.http.errors import ToolError
from api.http.serde import json_text
from api.openai.requests import FunctionDefinition, Message, NamedTool, Tool

ANY_OBJECT: dict[str, JsonValue] = {"type": "object"}
"""The JSON schema of an object with any properties."""

NO_TOOL = "no_tool"
_NO_TOOL = Tool(
    function=FunctionDefinition(
        name=NO_TOOL, description="Open ended response with no specific tool selected"
    )
)
DEFAULT_PROMPT = (
    "\nGiven the functions available, please respond with a JSON for a function call with its "
    "proper arguments that best answers the given prompt. Respond in the format "
    "{name: function name, parameters: dictionary of argument name and its value}."
    "Do not use variables.\n"
)


_NAME = re.compile(r'\s*\{\s*"function"\s*:\s*\{\s*"_name"\s*:\s*("(?:[^"\\]|\\.)*")', re.DOTALL)


class Call(NamedTuple):
    """The call of a tool. `arguments` is a string of JSON."""

    name: str
    arguments: str


def offered_tools(tools: list[Tool], choice: str | NamedTool | None) -> list[Tool]:
    """Return the tools that the model may choose from. If there is none, it answers in words.

    Raises ToolError if `choice` names a tool that is not there.
    """
    if not tools:
        return []
    match choice:
        case "none":
            return []
        case "required":
            return tools
        case None | "auto":
            return [*tools, _NO_TOOL]
        case NamedTool(function=function):
            return [_named(tools, function.name)]
        case str(name):
            return [_named(tools, name)]


def template_tools(tools: list[Tool]) -> list[dict[str, Any]]:
    """Describe `tools` to a chat template as TGI does."""
    return [
        {"type": tool.type, "function": function_json(tool.function, _schema(tool))}
        for tool in tools
    ]


def function_json(function: FunctionDefinition, arguments: object) -> dict[str, Any]:
    """Return TGI's JSON of a function. Its `arguments` are encoded as a string of JSON, even if
    they are a string already.
    """
    return {
        "description": function.description,
        "name": function.name,
        "arguments": json_text(arguments),
    }


def tool_grammar(tools: list[Tool]) -> GrammarType:
    """Return the JSON schema of a call of any of `tools`."""
    functions: dict[str, JsonValue] = {
        str(n): _call_schema(tool, f"#/$defs/{n}") for n, tool in enumerate(tools)
    }
    schema: dict[str, JsonValue] = {
        "$defs": functions,
        "type": "object",
        "properties": {"function": {"anyOf": [{"$ref": f"#/$defs/{n}"} for n in functions]}},
        "required": ["function"],
        "additionalProperties": False,
    }
    return GrammarType(type="json", value=schema)


def parse_call(text: str) -> Call:
    """Read a generated call. Raises ToolError if the text was cut short."""
    try:
        call = pydantic_core.from_json(text, allow_inf_nan=False)
        function = call["function"]
        name = function.pop("_name")
        return Call(name, json_text(function, allow_nan=False))
    except ValueError as error:
        raise _unparsable(str(error), text) from None
    except (KeyError, TypeError, AttributeError):
        raise _unparsable("missing field `function`", text) from None


def next_call_id(messages: list[Message]) -> str:
    """Return one more than the highest id of the calls so far, or a UUID if one is no number."""
    ids = [call.id for message in messages for call in message.tool_calls or ()]
    if not all(id.isascii() and id.isdigit() for id in ids):
        return str(uuid.uuid4())
    return str(max((int(id) + 1 for id in ids), default=0))


class CallReader:
    """Reads a generated call, `{"function": {"_name": "f", "a": 1}}`, token by token.

    It returns the text of the arguments, `{"a": 1}`, as they arrive: nothing until the `name` is
    known, and nothing once the call `is_complete`.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_complete = False
        self._pieces: list[str] = []
        self._is_at_first_argument = False

    def read(self, text: str) -> str | None:
        """Return the part of the arguments that `text` completes, or None."""
        if self.is_complete:
            return None
        self._pieces.append(text)
        if self.name is not None:
            return self._arguments(text)
        whole = "".join(self._pieces)
        found = _NAME.match(whole)
        if found is None:
            return None
        self.name = orjson.loads(found[1])
        self._is_at_first_argument = True
        return "{" + self._arguments(whole[found.end() :])

    def _arguments(self, text: str) -> str:
        if "}" in text and self._is_json():
            self.is_complete = True
            text = text.rstrip().removesuffix("}")
        if self._is_at_first_argument:
            text = text.lstrip()
            self._is_at_first_argument = not text
            text = text.removeprefix(",")
        return text

    def _is_json(self) -> bool:
        try:
            orjson.loads("".join(self._pieces))
        except orjson.JSONDecodeError:
            return False
        return True


def _named(tools: list[Tool], name: str) -> Tool:
    for tool in tools:
        if tool.function.name == name:
            return tool
    raise ToolError(f"Tool with name {name} not found")


def _schema(tool: Tool) -> JsonValue:
    """Return the schema of a tool's arguments, which OpenAI allows to be absent."""
    arguments = tool.function.arguments
    return ANY_OBJECT if arguments is None else arguments


def _call_schema(tool: Tool, place: str) -> JsonValue:
    """Return a tool's schema with its name as first property, to stand at `place` in the grammar's
    schema.
    """
    schema = _schema(tool)
    own = schema if isinstance(schema, dict) else {}
    properties, required = own.get("properties"), own.get("required")
    call: dict[str, JsonValue] = {
        "type": "object",
        "properties": {
            "_name": {"type": "string", "const": tool.function.name},
            **(properties if isinstance(properties, dict) else {}),
        },
        "required": ["_name", *(required if isinstance(required, list) else [])],
        "additionalProperties": own.get("additionalProperties", False),
    }
    call.update((key, own[key]) for key in ("$defs", "definitions") if key in own)
    return _moved(call, place)


def _moved(schema: JsonValue, place: str) -> JsonValue:
    """Let the references of `schema` start at `place`: they are relative to the root, which is no
    longer the tool's own schema.
    """
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, place)
        for key, value in schema.items()
    }


def _unparsable(detail: str, text: str) -> ToolError:
    return ToolError(f"Failed to parse generated text: {detail} {json_text(text)}")
