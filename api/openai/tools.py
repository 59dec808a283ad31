"""Tools: which are offered, the grammar that makes the model call one, and the call it made.

What is generated is `{"function": {"_name": "f", "a": 1}}`: the name in a property of its
own, first, so that a stream can tell early which tool it is. Where the choice is the
model's, one more tool stands for an answer in words.
"""

from typing import Any, NamedTuple

import pydantic_core
from pydantic import JsonValue

from api.generation.request import GrammarType
from api.http.errors import ToolError
from api.http.serde import json_text
from api.openai.messages import function_json
from api.openai.parameters import ANY_OBJECT
from api.openai.requests import FunctionDefinition, NamedTool, Tool

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


class Call(NamedTuple):
    """`arguments` are JSON."""

    name: str
    arguments: str


def offered(tools: list[Tool], choice: str | NamedTool | None) -> list[Tool]:
    """Those that the model may choose of; none at all means plain text. Raises ToolError."""
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
    """As TGI describes them to the model."""
    return [
        {"type": tool.type, "function": function_json(tool.function, _schema(tool))}
        for tool in tools
    ]


def tool_grammar(tools: list[Tool]) -> GrammarType:
    """A JSON schema of calls of any of `tools`."""
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
    """Raises ToolError where the text was cut short."""
    try:
        call = pydantic_core.from_json(text, allow_inf_nan=False)
        function = call["function"]
        name = function.pop("_name")
        return Call(name, json_text(function, allow_nan=False))
    except ValueError as error:
        raise _unparsable(str(error), text) from None
    except (KeyError, TypeError, AttributeError):
        raise _unparsable("missing field `function`", text) from None


def _named(tools: list[Tool], name: str) -> Tool:
    for tool in tools:
        if tool.function.name == name:
            return tool
    raise ToolError(f"Tool with name {name} not found")


def _schema(tool: Tool) -> JsonValue:
    """OpenAI lets a tool without arguments say nothing of them."""
    arguments = tool.function.arguments
    return ANY_OBJECT if arguments is None else arguments


def _call_schema(tool: Tool, place: str) -> JsonValue:
    """The tool's schema with its name in front, at `place` within the grammar's."""
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
    """References are from the root, which is no longer the tool's own."""
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
