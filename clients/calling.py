"""One face for the synchronous and the asynchronous half of a client."""

import asyncio
import inspect
from typing import Any

import pytest

sync_alone = pytest.mark.parametrize("client", ["sync"], indirect=True)
"""For what the two halves have in common, below the method that is called: one is enough."""


class Calls:
    """`calls.method(...)` is the client's own, awaited if need be, a stream read to its end
    into a list. Attributes that are not callable are namespaces, as in openai's client.
    """

    def __init__(self, client: Any, runner: asyncio.Runner | None) -> None:
        self._client, self._runner = client, runner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not callable(found):
            return Calls(found, self._runner)
        return lambda *args, **kwargs: self._finish(found, args, kwargs)

    def _finish(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._runner is not None:
            return self._runner.run(_drained(method, args, kwargs))
        answer = method(*args, **kwargs)
        return list(answer) if hasattr(answer, "__next__") else answer


async def _drained(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    answer = method(*args, **kwargs)
    if inspect.isawaitable(answer):
        answer = await answer
    return [item async for item in answer] if hasattr(answer, "__aiter__") else answer
