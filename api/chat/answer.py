"""The answers to a chat, put together from their events."""

from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass, field

from api.chat.events import ArgumentsDelta, CallStarted, ChatEvent, Ended, Started, TextDelta
from api.chat.generation import Events
from engine.core.request import TokenOutput


@dataclass(slots=True)
class Call:
    """The call of a tool. `arguments` is a JSON object, or the begin of one if it was cut."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class ChatAnswer:
    """One answer: a text, or the call of a tool. `end` is None until it is complete."""

    text: str = ""
    call: Call | None = None
    tokens: list[TokenOutput] = field(default_factory=list)
    end: Ended | None = None


async def collect(events: Events, n: int) -> list[ChatAnswer]:
    """Return the `n` answers, complete and in the order of their numbers."""
    answers = [ChatAnswer() for _ in range(n)]
    async with aclosing(events):
        async for pending in events:
            _add(answers, pending)
    return answers


def _add(answers: list[ChatAnswer], events: Iterable[ChatEvent]) -> None:
    for event in events:
        answer = answers[event.choice]
        match event:
            case Started():
                pass
            case TextDelta(_, text, tokens):
                answer.text += text
                answer.tokens += tokens
            case CallStarted(_, id, name, tokens):
                answer.call = Call(id, name)
                answer.tokens += tokens
            case ArgumentsDelta(_, text, tokens):
                assert answer.call is not None
                answer.call.arguments += text
                answer.tokens += tokens
            case Ended():
                answer.end = event
