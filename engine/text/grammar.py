"""Guided decoding: computes which tokens may come next so that the text matches a grammar.

llguidance parses grammars and computes token masks; this module decides its options. Compiling
is thread-safe and releases the interpreter lock. A state belongs to one sequence.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

from engine.core.errors import GrammarError
from engine.text.tokenizer import Tokenizer

_MAX_SOURCE_BYTES = 256 * 1024
_CACHE_SIZE = 256
_WHITESPACE = r"\x20"
"""At most one space between JSON's tokens, as in Text Generation Inference. Without a bound, a
model may fill its whole answer with white space."""
_LIMITS = LLParserLimits(verbose_errors=False)
"""The library's default limits: tens of milliseconds for a compilation, a few for a mask."""
_OPTIONS = {
    "whitespace_pattern": _WHITESPACE,
    "coerce_one_of": True,
    # Ignore a keyword that cannot be enforced, with a warning, as clients of outlines expect.
    "lenient": True,
}
_EMBEDDED = {"x-guidance": _OPTIONS}
"""The options of a schema that is part of a larger grammar."""
_DEFINITIONS = "$defs", "definitions"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled grammar, for any number of sequences. `warnings` are for the client."""

    _compiled: LLMatcher
    warnings: tuple[str, ...]

    def start(self) -> "GrammarState":
        return GrammarState(self._compiled.deep_copy())


class GrammarState:
    """The position of one sequence in its grammar. Once `error` is set, nothing else is valid."""

    __slots__ = ("_matcher",)

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)

    def forced(self) -> list[int]:
        """Return the tokens of the text that must come next, as the tokenizer encodes it."""
        return [] if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()

    @property
    def is_finished(self) -> bool:
        """Whether only the end of the sequence may follow."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """Why the grammar cannot be followed any further, or "".

        Either a limit was reached, or a token was accepted that the grammar does not allow.
        """
        return self._matcher.get_error()


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and caches the last ones. Thread-safe.

    Preparing the tokenizer takes a second or two. It is done by `prepare`, or else when the
    first grammar is compiled.

    vocab_size     width of the logits
    eos_token_ids  tokens that are allowed where the grammar may end
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]):
        self._source = tokenizer, vocab_size, sorted(eos_token_ids)
        self._prepared: LLTokenizer | None = None
        self._cache: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Prepare the tokenizer in a thread of its own, so that other requests do not wait."""
        threading.Thread(target=self._tokenizer, name="skiff-grammar", daemon=True).start()

    def _tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._prepared is None:
                tokenizer, vocab_size, eos_token_ids = self._source
                self._prepared = LLTokenizer(tokenizer.fast.to_str(), vocab_size, eos_token_ids)
            return self._prepared

    def json_schema(self, schema: dict[str, Any]) -> Grammar:
        """Compile a grammar of the JSON that is valid under `schema`. Raises GrammarError."""
        if not isinstance(schema, dict):
            raise GrammarError("a schema is an object")
        try:
            source = orjson.dumps(closed(schema)).decode()
        except RecursionError:
            raise GrammarError("it is nested too deeply") from None
        except TypeError as error:
            raise GrammarError(str(error)) from None
        return self._cached("json", source)

    def regex(self, pattern: str) -> Grammar:
        """Compile a grammar of the texts that `pattern` matches as a whole.

        The syntax is that of Rust's regex. Raises GrammarError.
        """
        return self._cached("regex", pattern)

    def call(self, tools: Seq[tuple[str, dict[str, Any]]]) -> Grammar:
        """Compile a grammar of the call of a tool: `{"name": "f", "parameters": {"a": 1}}`.

        Each tool has its name and the JSON schema of its parameters, which is read as if it stood
        alone. Raises GrammarError.
        """
        try:
            sources = [(name, orjson.dumps(closed(s) | _EMBEDDED).decode()) for name, s in tools]
            return self._cached("call", _call_source(sources))
        except RecursionError:
            raise GrammarError("it is nested too deeply") from None
        except (TypeError, GrammarError) as error:
            raise self._fault_of_one(tools) or GrammarError(str(error)) from None

    def _fault_of_one(self, tools: Seq[tuple[str, dict[str, Any]]]) -> GrammarError | None:
        """Return the error of the first tool whose schema is not valid alone either."""
        for name, schema in tools:
            try:
                self.json_schema(schema)
            except GrammarError as error:
                return GrammarError(f"the parameters of tool {name}: {error}")
        return None

    def _cached(self, kind: str, source: str) -> Grammar:
        key = kind, source
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        grammar = self._compile(kind, source)
        with self._lock:
            self._cache[key] = grammar
            if len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        return grammar

    def _compile(self, kind: str, source: str) -> Grammar:
        try:
            if len(source.encode()) > _MAX_SOURCE_BYTES:
                raise GrammarError(f"it is larger than {_MAX_SOURCE_BYTES} bytes")
            if kind == "json":
                text = LLMatcher.grammar_from_json_schema(source, overrides=_OPTIONS)  # type: ignore[arg-type]
            elif kind == "call":
                text = LLMatcher.grammar_from_lark(source)
            else:
                text = LLMatcher.grammar_from_regex(source)
        except ValueError as error:
            raise GrammarError(str(error)) from None
        matcher = LLMatcher(self._tokenizer(), text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        return Grammar(matcher, tuple(matcher.get_grammar_warnings()))


class TokenMasks:
    """Computes the token masks of a step's guided sequences, on several cores in parallel."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._executor = LLExecutor()

    def fill(self, states: Seq[GrammarState | None]) -> np.ndarray:
        """Return one mask a row, [rows, ceil(vocab_size / 32)] int32, a bit for each token.

        The mask of None allows every token.
        """
        masks = allocate_token_bitmask(len(states), self._vocab_size)
        matchers = [(s._matcher, row) for row, s in enumerate(states) if s is not None]
        if matchers:
            fill_next_token_bitmask_par(self._executor, matchers, masks)
        return masks


def _call_source(tools: Seq[tuple[str, str]]) -> str:
    """Return a Lark grammar, in which each JSON schema is a document of its own."""
    lines = ["start: " + " | ".join(f"call_{n}" for n in range(len(tools)))]
    for n, (name, schema) in enumerate(tools):
        head = '{"name": ' + _json(name) + ', "parameters": '
        lines += [f'call_{n}: {_json(head)} parameters_{n} "}}"', f"parameters_{n}: %json {schema}"]
    return "\n".join(lines)


def _json(text: str) -> str:
    return orjson.dumps(text).decode()


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
