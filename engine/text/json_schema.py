"""Rewrites a JSON schema to what guided decoding can follow, which is as much of it as possible.

Each function returns a new schema. All raise RecursionError for one that is nested too deeply.
"""

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

_DEFINITIONS = "$defs", "definitions"
_DATA = frozenset(("enum", "const", "default", "example", "examples"))
_MAPPINGS = frozenset(("properties", "patternProperties", "dependentSchemas", *_DEFINITIONS))
"""Keywords whose value has schemas under names, which are no keywords."""
_MAX_SHOWN = 100
"""Characters of a pattern that a warning repeats."""


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema as outlines, and so Text Generation Inference, reads it.

    A schema with properties is that of an object, which has no other properties unless the
    schema allows them. Schemas that are combined by `allOf` stay as they are, and so do the
    definitions that are combined there: each would exclude the properties of the others.
    """
    if "allOf" in schema:
        return schema
    result = {key: _closed_within(key, value) for key, value in schema.items()}
    for keyword in _DEFINITIONS:
        if isinstance(schema.get(keyword), dict):
            combined = set(_combined(schema))
            own = {n: d for n, d in schema[keyword].items() if f"#/{keyword}/{n}" in combined}
            result[keyword] |= own
    if isinstance(schema.get("properties"), dict):
        result.setdefault("type", "object")
        if "patternProperties" not in schema:
            result.setdefault("additionalProperties", False)
    return result


def _combined(part: Any) -> Iterator[str]:
    """Yield the references to schemas that are combined with others by `allOf`."""
    if isinstance(part, dict):
        members = part.get("allOf")
        if isinstance(members, list) and len(members) > 1:
            yield from (m["$ref"] for m in members if isinstance(m, dict) and "$ref" in m)
        part = list(part.values())
    if isinstance(part, list):
        for value in part:
            yield from _combined(value)


def _closed_within(keyword: str, value: Any) -> Any:
    if keyword in ("properties", "patternProperties", *_DEFINITIONS):
        is_mapping = isinstance(value, dict)
        return {name: _closed(part) for name, part in value.items()} if is_mapping else value
    if keyword in ("anyOf", "oneOf", "prefixItems"):
        return [_closed(part) for part in value] if isinstance(value, list) else value
    return _closed(value) if keyword in ("items", "additionalProperties") else value


def _closed(schema: Any) -> Any:
    return closed(schema) if isinstance(schema, dict) else schema


def enforceable(schema: Any, fault_of: Callable[[str], str], warnings: list[str]) -> Any:
    """Return the schema without the patterns that have a fault, each of which adds a warning.

    Whatever was valid stays valid: a property whose name is not matched with its pattern may have
    any name, even if the schema allows no others.

    fault_of  tells why a pattern cannot be enforced, or "" if it can
    """
    if not isinstance(schema, dict):
        return schema
    result = _rewritten(schema, lambda part: enforceable(part, fault_of, warnings))
    pattern, names = schema.get("pattern"), result.get("patternProperties")
    if isinstance(pattern, str) and (fault := fault_of(pattern)):
        del result["pattern"]
        warnings.append(_ignored(pattern, fault))
    if isinstance(names, dict):
        faults = {name: fault for name in names if (fault := fault_of(name))}
        warnings += [_ignored(name, fault) for name, fault in faults.items()]
        result["patternProperties"] = {n: part for n, part in names.items() if n not in faults}
        others = schema.get("additionalProperties", True)
        if faults and others is not True:
            others = result["additionalProperties"]
            result["additionalProperties"] = {"anyOf": [others, *(names[n] for n in faults)]}
    return result


def _ignored(pattern: str, fault: str) -> str:
    shown = pattern if len(pattern) <= _MAX_SHOWN else f"{pattern[:_MAX_SHOWN]}..."
    return f"Pattern ignored: {shown}: {fault}"


def finite(schema: Any) -> Any:
    """Return the schema with `false` for each reference under which no value ends.

    Such a definition has itself in each of its values, as `{"$ref": "#/$defs/a"}` under the name
    `a` does. Decoding would run into it, and could neither go on nor end.
    """
    return _Values(schema).without_endless(schema)


def _rewritten(schema: dict[str, Any], rewrite: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the schema with each schema in it rewritten, also under keywords not known here."""
    result = {}
    for key, value in schema.items():
        if key in _DATA:
            result[key] = value
        elif key in _MAPPINGS and isinstance(value, dict):
            result[key] = {name: rewrite(part) for name, part in value.items()}
        else:
            result[key] = [*map(rewrite, value)] if isinstance(value, list) else rewrite(value)
    return result


class _Values:
    """Finds the references of a schema under which a value ends."""

    def __init__(self, root: Any):
        self._finite: set[str] = set()
        self._unknown: list[str] = []
        resting_on: dict[str, list[str]] = {}
        references = frozenset(_references(root))
        queue = list(references)
        while queue:
            reference = queue.pop()
            self._unknown.clear()
            if reference not in self._finite and self._is_finite(_target(root, reference)):
                self._finite.add(reference)
                queue += resting_on.pop(reference, ())
            for other in self._unknown:
                resting_on.setdefault(other, []).append(reference)
        self._endless = references - self._finite

    def without_endless(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference in self._endless:
            return False
        return _rewritten(schema, self.without_endless)

    def _is_finite(self, schema: Any) -> bool:
        if not isinstance(schema, dict):
            return schema is not False
        reference = schema.get("$ref")
        return (
            (not isinstance(reference, str) or self._ends(reference))
            and all(map(self._is_finite, _list(schema.get("allOf"))))
            and all(
                any(map(self._is_finite, choices))
                for key in ("anyOf", "oneOf")
                if (choices := _list(schema.get(key)))
            )
            and all(map(self._is_finite, _needed(schema)))
        )

    def _ends(self, reference: str) -> bool:
        if reference in self._finite:
            return True
        self._unknown.append(reference)
        return False


def _needed(schema: dict[str, Any]) -> Iterator[Any]:
    """Yield the schemas of the parts that each value of `schema` has."""
    if schema.get("type") == "object":
        properties = schema.get("properties")
        names = properties if isinstance(properties, dict) else {}
        yield from (names[n] for n in _list(schema.get("required")) if n in names)
    if schema.get("type") == "array" and isinstance(schema.get("minItems"), int):
        first = _list(schema.get("prefixItems"))
        yield from first[: schema["minItems"]]
        if schema["minItems"] > len(first):
            yield schema.get("items", True)


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        part = list(part.values())
    if isinstance(part, list):
        for value in part:
            yield from _references(value)


def _target(root: Any, reference: str) -> Any:
    """Return the schema that a JSON pointer leads to, and True if there is none."""
    if reference != "#" and not reference.startswith("#/"):
        return True
    target = root
    for name in unquote(reference).split("/")[1:]:
        key = name.replace("~1", "/").replace("~0", "~")
        if isinstance(target, dict) and key in target:
            target = target[key]
        elif isinstance(target, list) and key.isdecimal() and int(key) < len(target):
            target = target[int(key)]
        else:
            return True
    return target


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
