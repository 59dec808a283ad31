"""Several async generators as one."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

from api.http.disconnect import cancel

T = TypeVar("T")
_Arrived = asyncio.Queue[tuple[int, T] | None]


async def merged(
    parts: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[list[tuple[int, T]], None]:
    """Run all `parts` at the same time, and yield what they yield with the number of the part.

    Items that are pending at the same time come in one list. The first error ends all. Closing
    this generator closes the parts.
    """
    if len(parts) == 1:
        async with aclosing(parts[0]) as items:
            async for item in items:
                yield [(0, item)]
        return
    arrived: _Arrived[T] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(n, part, arrived)) for n, part in enumerate(parts)]
    try:
        num_open = len(tasks)
        while num_open:
            pending = [await arrived.get()]
            while not arrived.empty():
                pending.append(arrived.get_nowait())
            num_open -= pending.count(None)
            if numbered := [item for item in pending if item is not None]:
                yield numbered
            _raise_first_error(tasks)
    finally:
        await cancel(*tasks)


async def _pump(number: int, part: AsyncGenerator[T, None], arrived: _Arrived[T]) -> None:
    """Put the items of `part` into `arrived`, and None after the last one."""
    try:
        async with aclosing(part) as items:
            async for item in items:
                arrived.put_nowait((number, item))
    finally:
        arrived.put_nowait(None)


def _raise_first_error(tasks: Sequence["asyncio.Task[None]"]) -> None:
    for task in tasks:
        if task.done():
            task.result()
