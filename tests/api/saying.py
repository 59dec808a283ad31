"""Scripts of a model that says one text, piece by piece."""

from collections.abc import Sequence

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
