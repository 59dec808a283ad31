"""Guided decoding: which tokens may come next so that the text matches a grammar.

llguidance parses and computes the masks; here are the choices made for it. Compiling is
safe in any thread and lets go of the interpreter lock; a state belongs to its sequence.
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
"""At most one space between JSON's tokens, as Text Generation Inference has it: unbounded, a
model may fill its whole answer with white space."""
_LIMITS = LLParserLimits(verbose_errors=False)
"""The library's own bound a compilation to tens of milliseconds and a mask to a few."""
_OPTIONS = {
    "whitespace_pattern": _WHITESPACE,
    "coerce_one_of": True,
    # A keyword that cannot be enforced is ignored, and told, as clients of outlines expect.
    "lenient": True,
}


_DEFINITIONS = "$defs", "definitions"


@dataclass(frozen=True, slots=True)
class Grammar:
    """Compiled once, for any number of sequences; `warnings` are for who wrote it."""

    _compiled: LLMatcher
    warnings: tuple[str, ...]

    def start(self) -> "GrammarState":
        return GrammarState(self._compiled.deep_copy())


class GrammarState:
    """How far one sequence has come. Once there is an `error`, nothing else means anything."""

    __slots__ = ("_matcher",)

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)

    def forced(self) -> list[int]:
        """The tokens of the text that must come next, in the tokenizer's own spelling."""
        return [] if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()

    @property
    def is_finished(self) -> bool:
        """Nothing but the end may follow."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """Why it cannot be followed any further: a limit, or a token that it does not allow."""
        return self._matcher.get_error()


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and remembers the last ones. Thread-safe.

    The tokenizer is prepared for it when it is first needed, or ahead: a second or two.

    vocab_size     width of the logits
    eos_token_ids  allowed where the grammar may end
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]):
        self._source = tokenizer, vocab_size, sorted(eos_token_ids)
        self._prepared: LLTokenizer | None = None
        self._cache: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """In a thread of its own, so that nobody waits who does not ask for a grammar."""
        threading.Thread(target=self._tokenizer, name="skiff-grammar", daemon=True).start()

    def _tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._prepared is None:
                tokenizer, vocab_size, eos_token_ids = self._source
                self._prepared = LLTokenizer(tokenizer.fast.to_str(), vocab_size, eos_token_ids)
            return self._prepared

    def json_schema(self, schema: dict[str, Any]) -> Grammar:
        """JSON that is valid under `schema`. Raises GrammarError."""
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
        """Text that `pattern`, in the syntax of Rust's regex, matches as a whole.

        Raises GrammarError.
        """
        return self._cached("regex", pattern)

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
            else:
                text = LLMatcher.grammar_from_regex(source)
        except ValueError as error:
            raise GrammarError(str(error)) from None
        matcher = LLMatcher(self._tokenizer(), text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        return Grammar(matcher, tuple(matcher.get_grammar_warnings()))


class TokenMasks:
    """Computes the masks of a step's guided sequences, on several cores at a time."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._executor = LLExecutor()

    def fill(self, states: Seq[GrammarState | None]) -> np.ndarray:
        """One mask a row, [rows, ceil(vocab_size / 32)] int32; None's allows every token."""
        masks = allocate_token_bitmask(len(states), self._vocab_size)
        matchers = [(s._matcher, row) for row, s in enumerate(states) if s is not None]
        if matchers:
            fill_next_token_bitmask_par(self._executor, matchers, masks)
        return masks


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as outlines, and so Text Generation Inference, reads it: what has properties
    is an object, and has those alone unless it says otherwise.

    Not where schemas are combined by `allOf`: each would exclude the properties of the others.
    Nor the definitions that are combined there.
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
    """What is referred to where several schemas are combined."""
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
