"""Compiles the `grammar` of a request, or raises a `ValidationError` in TGI's words.

Grammars are compiled in threads of their own, so that requests without one do not wait for them.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pydantic_core
from pydantic import JsonValue

from api.generation.request import GrammarType
from api.http.errors import ValidationError
from engine.core.errors import GrammarError

if TYPE_CHECKING:
    from engine.text.grammar import Grammar, GrammarCompiler

_TIMEOUT_S = 10.0
"""The compiler reaches its own limits long before this, unless the machine is overloaded."""
_MAX_DETAIL = 500  # characters


ToolSchemas = tuple[tuple[str, dict[str, JsonValue]], ...]
"""Tools by their names, each with the JSON schema of its parameters."""


class GrammarValidator:
    """Compiles grammars. `compiler` is None if grammars are not supported."""

    def __init__(self, compiler: "GrammarCompiler | None") -> None:
        self._compiler = compiler
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="grammar")

    def close(self) -> None:
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def validate(self, grammar: GrammarType, any_schema: bool) -> "Grammar":
        """Compile `grammar`. With `any_schema` a JSON schema need not have `properties`."""
        if self._compiler is None:
            raise ValidationError("grammar is not supported", field="grammar")
        if grammar.type == "regex":
            if not isinstance(grammar.value, str):
                raise ValidationError("grammar is not supported", field="grammar")
            return await self._compile(self._compiler.regex, grammar.value)
        schema = _schema(grammar.type, grammar.value)
        if not any_schema and "properties" not in schema:
            raise _not_valid("Grammar must have a 'properties' field")
        return await self._compile(self._compiler.json_schema, schema)

    async def validate_calls(self, tools: ToolSchemas) -> "Grammar":
        """Compile the grammar of a call of any of `tools`."""
        if self._compiler is None:
            raise ValidationError("grammar is not supported", field="tools")
        return await self._compile(self._compiler.call, tools, "tools")

    async def _compile(
        self, compile: "Callable[[Any], Grammar]", source: object, field: str = "grammar"
    ) -> "Grammar":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await loop.run_in_executor(self._workers, compile, source)
        except GrammarError as error:
            raise _not_valid(str(error), field) from None
        except TimeoutError:
            raise _not_valid("it takes too long to compile", field) from None


def _schema(type: str, value: JsonValue) -> dict[str, JsonValue]:
    """Return the JSON schema in `value`, which may be a string of JSON."""
    if type == "json_schema":
        if not isinstance(value, dict) or "schema" not in value:
            raise _not_valid("missing field `schema`")
        value = value["schema"]
    if isinstance(value, str):
        try:
            value = pydantic_core.from_json(value, allow_inf_nan=False)
        except ValueError as error:
            raise _not_valid(str(error)) from None
    if not isinstance(value, dict):
        raise ValidationError("grammar is not supported", field="grammar")
    return value


def _not_valid(detail: str, field: str = "grammar") -> ValidationError:
    """Return the error with a limited `detail`: the compiler may quote the whole grammar in it."""
    if len(detail) > _MAX_DETAIL:
        detail = detail[:_MAX_DETAIL] + "..."
    return ValidationError(f"grammar is not valid: {detail}", field=field)
