"""The outbox: what the engine thread sends reaches the event loop whole, in order and in few
deliveries.
"""

import asyncio
import threading
import time

import pytest

from engine.outbox import Outbox

pytestmark = pytest.mark.anyio


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_what_another_thread_sends_arrives_whole_and_in_order() -> None:
    received: list[int] = []
    outbox: Outbox[int] = Outbox(asyncio.get_running_loop(), received.append)

    def send() -> None:
        for item in range(2000):
            outbox.send(item)

    await asyncio.to_thread(send)
    async with asyncio.timeout(10):
        while len(received) < 2000:
            await asyncio.sleep(0.001)
    assert received == list(range(2000))


async def test_items_sent_before_the_loop_gets_to_them_arrive_in_one_delivery() -> None:
    turn, received = 0, []
    loop = asyncio.get_running_loop()
    outbox: Outbox[str] = Outbox(loop, lambda item: received.append((item, turn)))
    for item in "abc":
        outbox.send(item)
    assert received == []
    for turn in range(1, 4):  # noqa: B007  # read by the outbox's receiver
        await asyncio.sleep(0)
    assert [item for item, _ in received] == ["a", "b", "c"]
    assert len({turn for _, turn in received}) == 1


async def test_after_a_long_delivery_the_loop_rests_before_the_next() -> None:
    times: list[tuple[str, float]] = []
    loop = asyncio.get_running_loop()

    def receive(item: str) -> None:
        times.append((item, time.monotonic()))
        loop.call_soon(time.sleep, 0.2)  # stands for the tasks that a delivery wakes

    outbox: Outbox[str] = Outbox(loop, receive)
    outbox.send("first")
    await turns(3)
    ended = time.monotonic()
    outbox.send("second")
    outbox.send("third")
    await turns(3)
    assert [item for item, _ in times] == ["first"]
    async with asyncio.timeout(10):
        while len(times) < 3:
            await asyncio.sleep(0.01)
    assert times[1][1] - ended > 0.05
    assert [item for item, _ in times] == ["first", "second", "third"]


async def test_emptying_delivers_at_once_what_is_resting() -> None:
    received: list[int] = []
    loop = asyncio.get_running_loop()
    outbox: Outbox[int] = Outbox(loop, received.append)
    threading.Thread(target=outbox.send, args=(1,)).start()
    async with asyncio.timeout(10):
        while not outbox._items:  # sent by the other thread, and not delivered in this turn
            time.sleep(0.001)
    outbox.empty()
    assert received == [1]
    await turns(3)
    assert received == [1]


async def test_an_item_that_cannot_be_received_keeps_none_behind_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    received: list[int] = []

    def receive(item: int) -> None:
        received.append(6 // item)

    outbox: Outbox[int] = Outbox(asyncio.get_running_loop(), receive)
    for item in (1, 0, 2):
        outbox.send(item)
    await turns(3)
    assert received == [6, 3]
    assert "could not be delivered" in caplog.text
