"""`python -m api` in a process of its own, with a scripted engine: 20 tokens in a second."""

import asyncio
import sys
import types
from collections.abc import AsyncIterator

from api import __main__ as server
from engine.request import Event
from tests.api import scripted


class SlowGeneration(scripted.ScriptedGeneration):
    async def events(self) -> AsyncIterator[list[Event]]:
        async for events in super().events():
            await asyncio.sleep(0.05)
            yield events


class Engine:
    @classmethod
    def load(cls, *_: object) -> "Engine":
        return cls()

    def summary(self) -> list[str]:
        return ["one limit: 1"]


def twenty_tokens(_: object) -> list[list[Event]]:
    steps: list[list[Event]] = [[scripted.output("a")] for _ in range(20)]
    steps[-1].append(scripted.finished("a" * 20, 20))
    return steps


if __name__ == "__main__":
    module = types.ModuleType("engine.engine")
    module.Engine = Engine  # type: ignore[attr-defined]
    sys.modules["engine.engine"] = module
    scripted.ScriptedGeneration = SlowGeneration  # type: ignore[misc]
    server.AsyncEngine = lambda *_, **__: scripted.ScriptedEngine(twenty_tokens)  # type: ignore
    sys.exit(server.main(sys.argv[1:]))
