"""What the engine delivers of one answer, read as the events of a text or of a call."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from api.chat.call import CallReader, new_call_id
from api.chat.events import (
    ArgumentsDelta,
    CallStarted,
    ChatEvent,
    Ended,
    EndReason,
    Started,
    TextDelta,
)
from engine.core.request import Delivery, Finished, FinishReason, Token, TokenOutput
from engine.core.stop_text import StopText


class AnswerReader(Protocol):
    """Reads one answer."""

    choice: int

    @property
    def is_in_words(self) -> bool:
        """Whether the answer turned out to be the wish to answer in words."""

    def start(self) -> list[ChatEvent]:
        """Return the events before the first delivery."""

    def read(self, delivery: Delivery) -> list[ChatEvent]:
        """Return the events of a delivery."""


class TextAnswer:
    """An answer in words. It ends before the first stop string."""

    is_in_words = False

    def __init__(self, started: Started, stop: Sequence[str]) -> None:
        self.choice = started.choice
        self._started = started
        self._stop = StopText(stop) if stop else None

    def start(self) -> list[ChatEvent]:
        return [self._started]

    def read(self, delivery: Delivery) -> list[ChatEvent]:
        choice, (tokens, end) = self.choice, delivery
        events: list[ChatEvent] = [
            TextDelta(choice, text, (output,))
            for output, text in zip(tokens, self._texts(delivery), strict=True)
        ]
        if isinstance(end, Finished):
            events.append(Ended(choice, _end_reason(end), end))
        return events

    def _texts(self, delivery: Delivery) -> list[str]:
        """Return the text that can be shown after each token."""
        tokens = [output.token for output in delivery.tokens]
        if self._stop is None:
            return [_shown(token) for token in tokens]
        texts = [self._stop.push(token.text, token.special) for token in tokens]
        if delivery.end is not None and texts:
            texts[-1] += self._stop.flush()
        return texts


class CallAnswer:
    """An answer that is the call of a tool. It has no events if that is the tool `in_words`."""

    def __init__(self, started: Started, in_words: str | None) -> None:
        self.choice = started.choice
        self._started = started
        self._in_words = in_words
        self._call = CallReader()
        self._unnamed: list[TokenOutput] = []

    @property
    def is_in_words(self) -> bool:
        return self._call.name is not None and self._call.name == self._in_words

    def start(self) -> list[ChatEvent]:
        """Return nothing while the answer may turn out to be in words."""
        return [] if self._in_words is not None else [self._started]

    def read(self, delivery: Delivery) -> list[ChatEvent]:
        tokens, end = delivery
        events = [event for output in tokens for event in self._token(output)]
        if not isinstance(end, Finished) or self.is_in_words:
            return events
        if self._call.name is None:
            events += self._nameless()
        reason = "tool_calls" if self._call.is_complete else _end_reason(end)
        return [*events, Ended(self.choice, reason, end)]

    def _token(self, output: TokenOutput) -> Iterator[ChatEvent]:
        was_named = self._call.name is not None
        arguments = self._call.read(_shown(output.token))
        if self._call.name is None:
            self._unnamed.append(output)
        elif self.is_in_words:
            return
        elif was_named:
            yield ArgumentsDelta(self.choice, arguments, (output,))
        else:
            yield from self._named(self._call.name, arguments, output)

    def _named(self, name: str, arguments: str, output: TokenOutput) -> Iterator[ChatEvent]:
        if self._in_words is not None:
            yield self._started
        yield CallStarted(self.choice, new_call_id(), name, (*self._unnamed, output))
        if arguments:
            yield ArgumentsDelta(self.choice, arguments, ())

    def _nameless(self) -> list[ChatEvent]:
        """Return the events of a call that was cut before it had a name: an empty text."""
        start: list[ChatEvent] = [] if self._in_words is None else [self._started]
        return [*start, TextDelta(self.choice, "", tuple(self._unnamed))]


def _shown(token: Token) -> str:
    return "" if token.special else token.text


def _end_reason(end: Finished) -> EndReason:
    """Return the reason of a text: `stop` if the last allowed token completed a stop string."""
    is_cut = end.reason is FinishReason.LENGTH and end.stop is None
    return "length" if is_cut else "stop"
