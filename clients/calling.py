"""One interface for the synchronous and the asynchronous version of a client."""

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

sync_only = pytest.mark.parametrize("client", ["sync"], indirect=True)
"""Marks a test of code that both versions of a client share, for which one is enough."""


class Calls:
    """Calls a client's methods synchronously: `calls.method(...)` awaits the result if necessary,
    and reads a stream to its end into a list. Attributes that are not callable are namespaces, as
    in openai's client.
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
            return self._runner.run(_result_of(method, args, kwargs))
        answer = method(*args, **kwargs)
        return list(answer) if hasattr(answer, "__next__") else answer


def in_version(
    version: str, sync: Callable[..., Any], asynchronous: Callable[..., Any], **options: Any
) -> Iterator[Calls]:
    """Yield the client of a vendor's library, in its version "sync" or "async"."""
    options = {"api_key": "-", "max_retries": 0, "timeout": 60} | options
    if version == "sync":
        yield Calls(sync(**options), None)
    else:
        with asyncio.Runner() as runner:
            client = Calls(asynchronous(**options), runner)
            yield client
            client.close()


async def _result_of(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    answer = method(*args, **kwargs)
    if inspect.isawaitable(answer):
        answer = await answer
    return [item async for item in answer] if hasattr(answer, "__aiter__") else answer
