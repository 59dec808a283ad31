"""A test double of the async engine, which plays a script and counts its use.

A script is a list of steps, each a list of events. The step `HOLD` lets the generation wait until
the engine gives up. Prompts are tokenised by words, with a BOS token in front.
"""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, NamedTuple

from engine.async_engine import Overloaded
from engine.core.errors import EngineDead, GrammarError
from engine.core.metrics import (
    ColdStart,
    EngineFigures,
    EngineState,
    EngineStatus,
    ModelInfo,
    StepFigures,
)
from engine.core.request import (
    Delivery,
    Event,
    Failed,
    Finished,
    FinishReason,
    Request,
    Token,
    TokenOutput,
)
from engine.text.encoding import TokenSpans

HOLD: list[Event] = []
BOS = 1

Script = Callable[[Request], Sequence[list[Event]]]


def token(id: int, text: str, logprob: float | None = -0.5, special: bool = False) -> Token:
    return Token(id, text, logprob, special)


def output(text: str, logprob: float | None = -0.5, top: tuple[Token, ...] = ()) -> TokenOutput:
    return TokenOutput(token(len(text), text, logprob), top)


def finished(
    text: str,
    count: int,
    reason: FinishReason = FinishReason.LENGTH,
    seed: int | None = None,
) -> Finished:
    """Return the end of a generation. The engine fills in the length of the prompt."""
    return Finished(reason, text, 0, count, seed, queue_s=0.25, inference_s=0.5)


def two_tokens(_: Request) -> Sequence[list[Event]]:
    return [[output(" Hello")], [output(" you", -2.5839844), finished(" Hello you", 2)]]


class WordTokenizer:
    """Tokenises by words. Encoding waits while `gate` is clear, and raises `error` if it is set."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.chat_uses_tools = False
        self.words: set[str] = set()
        self.template_error: Exception | None = None
        self.chats: list[tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]] | None]] = []

    def chat_mentions(self, word: str) -> bool:
        return word in self.words

    def render_chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
    ) -> str:
        """Return `role: content` of each message, joined by bars."""
        self.chats.append((messages, tools))
        if self.template_error is not None:
            raise self.template_error
        return "|".join(f"{message['role']}: {message['content']}" for message in messages)

    def tokenize(self, text: str, add_special_tokens: bool = True) -> TokenSpans:
        """Return tokens of three bytes each."""
        if self.error is not None:
            raise self.error
        size = len(text.encode())
        spans = [(start, min(start + 3, size)) for start in range(0, size, 3)]
        tokens = [(stop - start, start, stop) for start, stop in spans]
        tokens = [(BOS, 0, 0), *tokens] if add_special_tokens else tokens
        ids, starts, stops = ([row[column] for row in tokens] for column in range(3))
        return TokenSpans(ids, starts, stops)

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:  # noqa: ARG002
        return " ".join(map(str, token_ids))

    def encode(
        self, text: str, truncate: int | None = None, add_special_tokens: bool = True
    ) -> list[int]:
        self.gate.wait(5)
        if self.error is not None:
            raise self.error
        ids = [len(word) for word in text.split(" ")] if text.strip("\0") else []
        ids = [BOS, *ids] if ids and add_special_tokens else ids
        return ids if truncate is None else ids[-truncate:]


class ScriptedGrammar(NamedTuple):
    kind: str
    source: object
    warnings: tuple[str, ...] = ()


def grammar_of(request: Request) -> object:
    """Return the grammar of a request, which is a `ScriptedGrammar` in tests."""
    return request.grammar


class ScriptedGrammars:
    """Compiles a grammar to itself, with a warning for every `not`."""

    def json_schema(self, schema: dict[str, object]) -> ScriptedGrammar:
        return ScriptedGrammar("json", schema, tuple("not: ignored" for _ in {"not"} & set(schema)))

    def call(self, tools: Sequence[tuple[str, dict[str, object]]]) -> ScriptedGrammar:
        return ScriptedGrammar("call", tools)

    def regex(self, pattern: str) -> ScriptedGrammar:
        try:
            re.compile(pattern)
        except re.error:
            raise GrammarError("not a regex") from None
        return ScriptedGrammar("regex", pattern)


class ScriptedPermit:
    def __init__(self, engine: "ScriptedEngine", count: int) -> None:
        self._engine, self._count = engine, count

    def __enter__(self) -> "ScriptedPermit":
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.num_permits += self._count


class ScriptedGeneration:
    def __init__(self, engine: "ScriptedEngine", steps: Sequence[list[Event]]) -> None:
        self._engine, self._steps = engine, steps
        self._ended = False

    def __enter__(self) -> "ScriptedGeneration":
        self._engine.num_open += 1
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._engine.num_open -= 1
        if not self._ended:
            self.abort()

    def abort(self) -> None:
        self._ended = True
        self._engine.num_aborts += 1

    async def deliveries(self) -> AsyncIterator[Delivery]:
        for events in self._steps:
            if events is HOLD:
                self._engine.holding.set()
                await self._engine.gave_up.wait()
                self._ended = True
                yield Delivery([], Failed(self._engine.reason or ""))
                return
            await asyncio.sleep(0)
            delivery = _delivery(events)
            self._ended = delivery.end is not None
            yield delivery


def _delivery(events: list[Event]) -> Delivery:
    tokens = [event for event in events if isinstance(event, TokenOutput)]
    end = events[-1]
    return Delivery(tokens, None if isinstance(end, TokenOutput) else end)


def _of_request(request: Request, events: list[Event]) -> list[Event]:
    if not events or not isinstance(events[-1], Finished):
        return events
    return [*events[:-1], replace(events[-1], num_prompt_tokens=len(request.prompt_ids))]


class ScriptedEngine:
    """The double of `AsyncEngine`. `made` has all engines of a test, for the leak detector."""

    max_total_tokens = 2048
    made: ClassVar[list["ScriptedEngine"]] = []

    def __init__(self, script: Script = two_tokens, permits: int = 128) -> None:
        self.script = script
        self.tokenizer = WordTokenizer()
        self.grammars = ScriptedGrammars()
        self.on_step: Callable[[StepFigures], None] | None = None
        self.model = ModelInfo(
            "org/model", "abc123", "text-generation", "bfloat16", "NVIDIA H200", 100, 1 << 30, None
        )
        self.cold_start = ColdStart()
        self.is_prepared = True
        self.state: EngineState = "ready"
        self.reason: str | None = None
        self.max_permits = self.num_permits = permits
        self.num_open = 0
        self.num_aborts = 0
        self.num_starts = 0
        self.num_stops = 0
        self.requests: list[Request] = []
        self.holding = asyncio.Event()
        self.gave_up = asyncio.Event()
        ScriptedEngine.made.append(self)

    @property
    def free_permits(self) -> int:
        return self.num_permits

    def start(self) -> None:
        self.num_starts += 1

    async def stop(self, _: float = 0.0) -> None:
        self.num_stops += 1

    def admit(self, permits: int = 1) -> ScriptedPermit:
        if permits > self.num_permits:
            raise Overloaded
        self.num_permits -= permits
        return ScriptedPermit(self, permits)

    def give_up(self, reason: str) -> None:
        self.reason = reason
        self.gave_up.set()

    def submit_all(self, requests: Sequence[Request]) -> list[ScriptedGeneration]:
        return [self.submit(request) for request in requests]

    def submit(self, request: Request) -> ScriptedGeneration:
        if self.state == "dead":
            raise EngineDead(self.reason)
        self.requests.append(request)
        steps = self.script(request)
        return ScriptedGeneration(self, [_of_request(request, events) for events in steps])

    def status(self) -> EngineStatus:
        return EngineStatus(self.state, self.reason, EngineFigures())
