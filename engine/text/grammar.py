"""Guided decoding: computes which tokens may come next so that the text matches a grammar.

llguidance parses grammars and computes token masks; this module decides its options. Compiling
is thread-safe and releases the interpreter lock. A state belongs to one sequence.
"""

import random
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

from engine.core.errors import GrammarError
from engine.text.json_schema import closed, enforceable, finite
from engine.text.tokenizer import Tokenizer

_MAX_SOURCE_BYTES = 256 * 1024
_CACHE_SIZE = 256
_WHITESPACE = r"\x20"
"""At most one space between JSON's tokens, as in Text Generation Inference. Without a bound, a
model may fill its whole answer with white space."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")
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
_MAX_PATTERNS = 32
"""Patterns of a schema that are tried one by one, which takes half a second at most for each."""
_NUM_TRIED = 32
"""Tokens of a text that is tried on each new grammar."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled grammar, for any number of sequences. `warnings` are for the client."""

    _compiled: LLMatcher
    warnings: tuple[str, ...]

    def start(self) -> "GrammarState":
        return GrammarState(self._compiled.deep_copy())

    def is_spent(self) -> bool:
        """Whether no sequence can be started any more.

        The sequences share what they learn of the lexer. The limits of that are final once one of
        them has reached them.
        """
        matcher = self._compiled.deep_copy()
        matcher.compute_bitmask()
        return matcher.is_error()


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
        self._pattern_fault = lru_cache(maxsize=1024)(self._find_pattern_fault)

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
        whole, source = _closed_source(schema)
        return self._cached("json", source, lambda: self._compile_schema(whole))

    def call(self, tools: Seq[tuple[str, dict[str, Any]]]) -> Grammar:
        """Compile a grammar of the call of a tool: `{"name": "f", "parameters": {"a": 1}}`.

        Each tool has its name and the JSON schema of its parameters, which is read as if it stood
        alone. Raises GrammarError, which names the tool whose schema is at fault.
        """
        schemas: list[tuple[str, Any]] = []
        sources: list[str] = []
        for name, schema in tools:
            with _named_fault(name):
                whole, source = _closed_source(schema)
            schemas.append((name, whole))
            sources += [name, source]
        return self._cached("call", _json(sources), lambda: self._compile_call(schemas))

    def regex(self, pattern: str) -> Grammar:
        """Compile a grammar of the texts that `pattern` matches as a whole.

        The syntax is that of Rust's regex. Raises GrammarError.
        """
        return self._cached("regex", pattern, lambda: self._compile_regex(pattern))

    def _cached(self, kind: str, source: str, compile: Callable[[], Grammar]) -> Grammar:
        _check_size(source)
        key = kind, source
        with self._lock:
            cached = self._cache.get(key)
            if cached is not None:
                self._cache.move_to_end(key)
        if cached is not None and not cached.is_spent():
            return cached
        grammar = compile()
        with self._lock:
            self._cache[key] = grammar
            if len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        return grammar

    def _compile_regex(self, pattern: str) -> Grammar:
        return self._compile(LLMatcher.grammar_from_regex(pattern))

    def _compile_schema(self, schema: dict[str, Any]) -> Grammar:
        warnings: list[str] = []
        return self._compile(_json_grammar(self._followable(schema, warnings)), warnings)

    def _compile_call(self, tools: Seq[tuple[str, dict[str, Any]]]) -> Grammar:
        warnings: list[str] = []
        followable: list[tuple[str, Any]] = []
        for name, schema in tools:
            with _named_fault(name):
                followable.append((name, self._followable(schema, warnings)))
        try:
            return self._compile(_call_grammar(followable), warnings)
        except GrammarError:
            for name, schema in tools:
                with _named_fault(name):
                    self._compile_schema(schema)
            raise

    def _followable(self, schema: dict[str, Any], warnings: list[str]) -> Any:
        """Return the schema without what cannot be followed, each of which adds a warning."""
        faults: dict[str, str] = {}

        def fault_of(pattern: str) -> str:
            if pattern not in faults and len(faults) < _MAX_PATTERNS:
                faults[pattern] = self._pattern_fault(pattern)
            return faults.get(pattern, "")

        try:
            followed = finite(enforceable(schema, fault_of, warnings))
        except RecursionError:
            raise GrammarError("it is nested too deeply") from None
        if followed is False:
            raise GrammarError("Unsatisfiable schema: no value of it ends")
        return followed

    def _find_pattern_fault(self, pattern: str) -> str:
        """Return why a pattern cannot be followed, even if it is all there is; "" if it can."""
        try:
            self._compile(_json_grammar({"type": "string", "pattern": pattern}))
        except GrammarError as error:
            *_, reason = str(error).splitlines()
            if not reason.startswith("Unsatisfiable"):
                return reason.removeprefix("error: ").partition(" in regex ")[0]
        return ""

    def _compile(self, text: str, warnings: Seq[str] = ()) -> Grammar:
        matcher = LLMatcher(self._tokenizer(), text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        self._try(matcher.deep_copy())
        told = (*warnings, *matcher.get_grammar_warnings())
        return Grammar(matcher, tuple(_CONTROL.sub(" ", warning) for warning in told))

    def _try(self, matcher: LLMatcher) -> None:
        """Follow some text that the grammar allows. Raises GrammarError if it cannot be followed.

        A grammar may have no text at all, or reach the limits of a step after a few tokens.
        """
        choose, eos_token_ids = random.Random(0).choice, self._source[2]
        for _ in range(_NUM_TRIED):
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            if matcher.is_error():
                reason, _, _ = matcher.get_error().partition("\n")
                raise GrammarError(f"it cannot be followed: {reason}")
            allowed = np.unpackbits(mask, bitorder="little")
            allowed[eos_token_ids] = 0
            token_ids = np.flatnonzero(allowed)
            if not len(token_ids):
                return
            matcher.consume_token(int(choose(token_ids)))


def _closed_source(schema: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the closed schema and its JSON."""
    if not isinstance(schema, dict):
        raise GrammarError("a schema is an object")
    try:
        whole = closed(schema)
        return whole, _json(whole)
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except TypeError as error:
        raise GrammarError(str(error)) from None


@contextmanager
def _named_fault(tool: str) -> Iterator[None]:
    """Have an error name the tool whose schema is at fault."""
    try:
        yield
    except GrammarError as error:
        raise GrammarError(f"the parameters of tool {tool}: {error}") from None


def _call_grammar(tools: Seq[tuple[str, Any]]) -> str:
    """Return a grammar in Lark's language, in which each schema is a document of its own."""
    lines = ["start: " + " | ".join(f"call_{n}" for n in range(len(tools)))]
    for n, (name, schema) in enumerate(tools):
        head = '{"name": ' + _json(name) + ', "parameters": '
        lines += [
            f'call_{n}: {_json(head)} parameters_{n} "}}"',
            f"parameters_{n}: %json {_json(schema | _EMBEDDED)}",
        ]
    return LLMatcher.grammar_from_lark("\n".join(lines))


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


def _json_grammar(schema: Any) -> str:
    source = _json(schema)
    try:
        return LLMatcher.grammar_from_json_schema(source, overrides=_OPTIONS)  # type: ignore[arg-type]
    except ValueError as error:
        raise GrammarError(str(error)) from None


def _check_size(source: str) -> None:
    try:
        size = len(source.encode())
    except UnicodeEncodeError as error:
        raise GrammarError(str(error)) from None
    if size > _MAX_SOURCE_BYTES:
        raise GrammarError(f"it is larger than {_MAX_SOURCE_BYTES} bytes")


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
