"""Runs `python -m api` with a scripted engine that generates 20 tokens in a second.

The argument `--hurried` in front of the flags has clients be waited for no longer than a second.
"""

import asyncio
import sys
import time
import types
from collections.abc import AsyncIterator

from api import process as server
from api import server as serving
from api.http.connections import Patience
from engine.core.config import LoadConfig
from engine.core.request import Delivery, Event, Request
from engine.loading import hub
from tests.api import scripted


class SlowGeneration(scripted.ScriptedGeneration):
    async def deliveries(self) -> AsyncIterator[Delivery]:
        async for delivery in super().deliveries():
            await asyncio.sleep(0.05)
            yield delivery


class Engine:
    info = types.SimpleNamespace(device="cpu")

    @classmethod
    def load(cls, config: LoadConfig, *_: object) -> "Engine":
        if config.model_id == "slow":
            print("loading", flush=True)
            time.sleep(60)
        return cls()

    def summary(self) -> list[str]:
        return ["one limit: 1"]


def twenty_tokens(request: Request) -> list[list[Event]]:
    """Generate 20 tokens, or one and then nothing if the prompt has more than one word."""
    if len(request.prompt_ids) > 2:
        return [[scripted.output("a")], scripted.HOLD]
    steps: list[list[Event]] = [[scripted.output("a")] for _ in range(20)]
    steps[-1].append(scripted.finished("a" * 20, 20))
    return steps


HURRIED = Patience(idle_s=3.0, head_s=1.0, body_s=1.0, unread_s=1.0, dropped_s=1.0, closing_s=1.0)

if __name__ == "__main__":
    flags = sys.argv[1:]
    if flags[:1] == ["--hurried"]:
        serving.PATIENCE = HURRIED
        del flags[0]
    module = types.ModuleType("engine.engine")
    module.Engine = Engine  # type: ignore[attr-defined]
    sys.modules["engine.engine"] = module
    hub.check_model_id = lambda *_: None
    scripted.ScriptedGeneration = SlowGeneration  # type: ignore[misc]
    server.AsyncEngine = lambda *_, **__: scripted.ScriptedEngine(twenty_tokens)  # type: ignore
    sys.exit(server.main(flags))
