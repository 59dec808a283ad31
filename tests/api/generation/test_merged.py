"""Several generators as one: their items, their errors, and that all of them are closed."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from api.generation.merged import merged

pytestmark = pytest.mark.anyio


class Source:
    """Makes generators and counts those that are open."""

    def __init__(self) -> None:
        self.num_open = 0

    async def counting(self, stop: int, fail: bool = False) -> AsyncGenerator[int, None]:
        self.num_open += 1
        try:
            for n in range(stop):
                yield n
                await asyncio.sleep(0)
            if fail:
                raise ValueError("no more")
        finally:
            self.num_open -= 1

    async def waiting(self) -> AsyncGenerator[int, None]:
        self.num_open += 1
        try:
            yield 0
            await asyncio.Event().wait()
        finally:
            self.num_open -= 1


@pytest.mark.parametrize("lengths", [[3], [3, 0], [2, 5, 1]])
async def test_each_part_keeps_its_order(lengths: list[int]) -> None:
    source = Source()
    found: dict[int, list[int]] = {n: [] for n in range(len(lengths))}
    async for pending in merged([source.counting(length) for length in lengths]):
        assert pending
        for number, item in pending:
            found[number].append(item)
    assert found == {n: list(range(length)) for n, length in enumerate(lengths)}
    assert source.num_open == 0


@pytest.mark.parametrize("others", [0, 1, 2])
async def test_the_first_error_ends_all(others: int) -> None:
    source = Source()
    parts = [source.counting(2, fail=True), *(source.waiting() for _ in range(others))]
    found: list[int] = []

    async def read() -> None:
        async for pending in merged(parts):
            found.extend(item for number, item in pending if number == 0)

    with pytest.raises(ValueError, match="no more"):
        await read()
    assert found == [0, 1]
    assert source.num_open == 0


@pytest.mark.parametrize("count", [1, 3])
async def test_closing_closes_the_parts(count: int) -> None:
    source = Source()
    async with aclosing(merged([source.waiting() for _ in range(count)])) as items:
        await anext(items)
        assert source.num_open == count
    assert source.num_open == 0
