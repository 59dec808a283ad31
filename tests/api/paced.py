"""An engine for `AsyncEngine` that needs no model: each step makes a token of every request."""

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from engine.core.metrics import ColdStart, EngineFigures, ModelInfo, StepFigures
from engine.core.request import Event, Failed, Request
from tests.api.scripted import ScriptedGrammars, WordTokenizer, finished, output

_STEP_S = 0.02


class PacedEngine:
    """The double of `Engine`. `before_step` is called at the beginning of each step."""

    def __init__(self, before_step: Callable[[], None]) -> None:
        self.limits = SimpleNamespace(max_total_tokens=2048)
        self.tokenizer = WordTokenizer()
        self.grammars = ScriptedGrammars()
        self.info = ModelInfo("paced", None, None, "float32", "cpu", 100, 1 << 20, None)
        self.cold_start = ColdStart()
        self.last_step: StepFigures | None = None
        self._before_step = before_step
        self._num_steps = 0
        self._live: dict[str, tuple[Request, int]] = {}

    def summary(self) -> list[str]:
        return []

    def add(self, request: Request, forks: Sequence[Request]) -> None:
        self._live |= {each.request_id: (each, 0) for each in (request, *forks)}

    def abort(self, request_id: str) -> None:
        self._live.pop(request_id, None)

    def fail_all(self, message: str) -> list[tuple[str, Event]]:
        failed: list[tuple[str, Event]] = [(live, Failed(message)) for live in self._live]
        self._live.clear()
        return failed

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def capture_next_graph(self) -> bool:
        return False

    def figures(self) -> EngineFigures:
        return EngineFigures(num_running=len(self._live), num_steps=self._num_steps)

    def step(self, launched: Callable[[], None]) -> list[tuple[str, Event]]:
        self._before_step()
        launched()
        time.sleep(_STEP_S)
        self._num_steps += 1
        events: list[tuple[str, Event]] = []
        for request_id, (request, made) in list(self._live.items()):
            events.append((request_id, output("a")))
            self._live[request_id] = request, made + 1
            if made + 1 == request.stopping.max_new_tokens:
                events.append((request_id, finished("a" * (made + 1), made + 1)))
                del self._live[request_id]
        return events

    def close(self) -> None:
        pass
