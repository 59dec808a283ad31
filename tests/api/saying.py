"""Scripts of a model that says one text, piece by piece."""

import json
from collections.abc import Sequence
from typing import Any

import httpx2

from engine.core.request import Event, FinishReason, Request, TokenOutput
from tests.api.scripted import ScriptedEngine, finished, output, token

EOS = TokenOutput(token(2, "</s>", special=True))
CALL = ['{"', 'name": "', "weather", '", "parameters":', ' {"', 'city":', ' "Oslo', '"}', "}"]
"""The pieces of a call of the tool `weather`."""
NO_TOOL = ['{"name": "', 'no_tool"', ', "parameters": {}}']
"""The pieces of a call of the tool that stands for an answer in words."""


def saying(*pieces: str, reason: FinishReason = FinishReason.EOS_TOKEN) -> ScriptedEngine:
    """Return an engine that generates `pieces` under a grammar, and " Hello you" without one."""

    def script(request: Request) -> Sequence[list[Event]]:
        said = [" Hello", " you"] if request.grammar is None else pieces
        outputs = [output(piece) for piece in said]
        if reason is FinishReason.EOS_TOKEN:
            outputs.append(EOS)
        end = finished("".join(said), len(outputs), reason)
        steps: list[list[Event]] = [[piece] for piece in outputs[:-1]]
        return [*steps, [outputs[-1], end]]

    return ScriptedEngine(script)


def typed_events(answer: httpx2.Response) -> list[dict[str, Any]]:
    """Return the events of a stream in which each has its type as its name."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream"
    events: list[dict[str, Any]] = []
    for frame in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events
