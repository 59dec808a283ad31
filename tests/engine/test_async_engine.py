"""The engine behind an event loop: the end of every request, aborts, permits and the status."""

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from engine.async_engine import AsyncEngine, Overloaded
from engine.core.errors import EngineDead
from engine.core.pipeline import LaunchedStep
from engine.core.request import (
    Event,
    Failed,
    Finished,
    Request,
    TokenOutput,
)
from engine.core.scheduler import Batch
from engine.engine import Engine
from engine.step.builder import StepInputs
from tests.engine.driving import greedy, make_engine
from tests.engine.models import family
from tests.engine.test_failures import sabotage

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def serving(engine: Engine, **options: float) -> AsyncIterator[AsyncEngine]:
    served = AsyncEngine(engine, **options)  # type: ignore[arg-type]
    served.start()
    try:
        yield served
    finally:
        await served.stop()


async def answer(served: AsyncEngine, request: Request) -> list[Event]:
    with served.submit(request) as generation:
        events: list[Event] = []
        async for tokens, end in generation.deliveries():
            events += tokens
            if end is not None:
                events.append(end)
        return events


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def idle(engine: Engine) -> Callable[[], bool]:
    return lambda: not engine.has_work and engine.figures().num_used_blocks == 0


async def test_concurrent_requests_get_their_own_tokens_and_one_end() -> None:
    engine = make_engine(family("llama"), max_sequences=4)
    async with serving(engine) as served:
        requests = [greedy([i, i + 1], 10) for i in range(12)]
        answers = await asyncio.gather(*(answer(served, r) for r in requests))
        again = await answer(served, greedy([3, 4], 10))
    for events in answers:
        assert [type(e) for e in events] == [TokenOutput] * 10 + [Finished]
    ids = [[e.token.id for e in events if isinstance(e, TokenOutput)] for events in answers]
    assert [e.token.id for e in again if isinstance(e, TokenOutput)] == ids[3]


@pytest.mark.parametrize("seen", [0, 1, 3])
async def test_leaving_early_frees_the_sequence(seen: int) -> None:
    engine = make_engine(family("llama"))
    async with serving(engine) as served:
        with served.submit(greedy(range(40), 150)) as generation:
            for _ in range(seen):
                await anext(generation.deliveries())
        await eventually(idle(engine))
        assert (await answer(served, greedy([1], 2)))[-1].__class__ is Finished


async def test_giving_up_fails_running_requests_and_no_later_ones() -> None:
    engine = make_engine(family("llama"))
    async with serving(engine) as served:
        running = [asyncio.create_task(answer(served, greedy([i], 200))) for i in range(3)]
        await eventually(lambda: engine.figures().num_running == 3)
        served.give_up("it is late")
        for events in await asyncio.gather(*running):
            assert events[-1] == Failed("it is late")
        await eventually(idle(engine))
        assert isinstance((await answer(served, greedy([1], 2)))[-1], Finished)


async def test_each_step_is_reported_once_on_the_event_loop() -> None:
    engine, told = make_engine(family("llama")), []
    loop_thread = threading.get_ident()
    async with serving(engine) as served:
        served.on_step = lambda figures: told.append((figures, threading.get_ident()))
        await answer(served, greedy(range(40), 5))
    figures = [step for step, _ in told]
    assert {thread for _, thread in told} == {loop_thread}
    assert sum(step.num_admitted for step in figures) == 1
    assert sum(step.num_prefills for step in figures) == 1
    assert figures[0].num_tokens == 40
    assert sum(step.num_decodes for step in figures) >= 4
    assert not any(step.failed for step in figures)


async def test_a_cancelled_task_frees_the_sequence() -> None:
    engine = make_engine(family("llama"))
    async with serving(engine) as served:
        task = asyncio.create_task(answer(served, greedy(range(40), 150)))
        await eventually(lambda: engine.has_work)
        task.cancel()
        await eventually(idle(engine))


async def test_permits_are_refused_beyond_the_limit_and_given_back() -> None:
    async with serving(make_engine(family("llama")), max_concurrent_requests=3) as served:
        with served.admit(2):
            with served.admit(), pytest.raises(Overloaded):
                served.admit()
            with pytest.raises(Overloaded):
                served.admit(2)
        with served.admit(3):
            pass


async def test_status_turns_stalled_while_a_step_hangs_and_recovers() -> None:
    engine, release = make_engine(family("llama")), threading.Event()

    def hang(_: StepInputs) -> bool:
        release.wait(10)
        return False

    sabotage(engine, hang, ValueError())
    async with serving(engine, stall_timeout_s=0.1) as served:
        assert served.status().state == "ready"
        task = asyncio.create_task(answer(served, greedy([1, 2], 3)))
        await eventually(lambda: served.status().state == "stalled")
        started = time.perf_counter()
        assert "no progress" in (served.status().reason or "")
        assert time.perf_counter() - started < 5  # the step hangs for 10
        release.set()
        assert isinstance((await task)[-1], Finished)
        assert served.status().healthy


async def test_a_dead_engine_fails_every_request_with_the_reason() -> None:
    engine = make_engine(family("llama"))
    async with serving(engine) as served:

        def die(**_: object) -> None:
            raise RuntimeError("no such device")

        requests = [greedy([i], 200) for i in range(3)]
        tasks = [asyncio.create_task(answer(served, r)) for r in requests]
        await eventually(lambda: len(engine.scheduler.running) == 3)
        engine.step = die  # type: ignore[method-assign, assignment]
        for task in tasks:
            assert (await task)[-1] == Failed("no such device")
        assert served.status().state == "dead"
        assert served.status().reason == "no such device"
        with pytest.raises(EngineDead, match="no such device"):
            served.submit(greedy([1], 1))


async def test_a_death_is_told_once_when_every_request_has_failed() -> None:
    engine = make_engine(family("llama"))
    async with serving(engine) as served:
        told: list[list[bool]] = []
        tasks = [asyncio.create_task(answer(served, greedy([i], 200))) for i in range(3)]
        served.on_death = lambda: told.append([not served._generations])
        await eventually(lambda: len(engine.scheduler.running) == 3)

        def die(**_: object) -> None:
            raise EngineDead("CUDA error")

        engine.step = die  # type: ignore[method-assign, assignment]
        for task in tasks:
            assert (await task)[-1] == Failed("CUDA error")
        await eventually(lambda: told == [[True]])
    assert told == [[True]]


async def test_an_error_without_words_is_told_by_its_name() -> None:
    engine = make_engine(family("llama"))
    async with serving(engine) as served:

        def die(**_: object) -> None:
            raise AssertionError

        engine.step = die  # type: ignore[method-assign, assignment]
        assert (await answer(served, greedy([1], 2)))[-1] == Failed("AssertionError()")


async def test_an_orderly_stop_is_no_death() -> None:
    async with serving(make_engine(family("llama"))) as served:
        served.on_death = lambda: pytest.fail("it did not die")


@asynccontextmanager
async def hanging(release: threading.Event, **options: float) -> AsyncIterator[AsyncEngine]:
    """An engine whose steps hang until `release`, and whose thread has ended at the end."""
    engine = make_engine(family("llama"))
    sabotage(engine, lambda _: not release.wait(60), ValueError())
    async with serving(engine, **options) as served:
        yield served
        release.set()
    served._thread.join(20)
    assert not served._thread.is_alive()


async def test_a_hung_step_fails_every_request_and_is_a_death() -> None:
    release, told = threading.Event(), asyncio.Event()
    async with hanging(release, watchdog_timeout_s=0.3) as served:
        served.on_death = told.set
        tasks = [asyncio.create_task(answer(served, greedy([i], 5))) for i in range(3)]
        for task in tasks:
            (failed,) = await task
            assert isinstance(failed, Failed)
            assert "has hung" in failed.message
        await asyncio.wait_for(told.wait(), 10)
        assert served.status().state == "dead"
        with pytest.raises(EngineDead, match="has hung"):
            served.submit(greedy([1], 1))


async def test_the_log_says_where_a_step_hangs(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    async with hanging(release, watchdog_timeout_s=0.3) as served:
        await answer(served, greedy([1], 5))
        (record,) = [r for r in caplog.records if "hangs" in r.getMessage()]
        assert "in step" in record.getMessage()
        release.set()
        await eventually(lambda: not served._thread.is_alive())


@pytest.mark.slow
async def test_the_time_of_a_stopped_process_does_not_count_as_a_hang() -> None:
    """An event loop that is held up stands for a process that is stopped as a whole."""
    release = threading.Event()
    async with hanging(release, watchdog_timeout_s=5.0) as served:
        task = asyncio.create_task(answer(served, greedy([1], 2)))
        await eventually(lambda: served._busy_since is not None)
        time.sleep(5.5)
        await asyncio.sleep(0.1)
        assert served.status().state == "ready"
        release.set()
        assert isinstance((await task)[-1], Finished | Failed)
        assert served.status().state == "ready"


async def test_steps_that_follow_one_another_are_no_hang() -> None:
    async with serving(make_engine(family("llama")), watchdog_timeout_s=0.5) as served:
        assert isinstance((await answer(served, greedy([1], 150)))[-1], Finished)
        assert served.status().healthy


async def test_a_capture_that_hangs_while_there_is_no_work_is_a_death() -> None:
    engine, release = make_engine(family("llama")), threading.Event()
    engine.capture_next_graph = lambda: release.wait(60) and False  # type: ignore[method-assign]
    async with serving(engine, watchdog_timeout_s=0.3) as served:
        await eventually(lambda: served.status().state == "dead")
        release.set()


async def test_stopping_does_not_wait_for_a_step_that_hangs() -> None:
    release = threading.Event()
    async with hanging(release) as served:
        task = asyncio.create_task(answer(served, greedy([1], 5)))
        await eventually(lambda: served._busy_since is not None)
        started = time.monotonic()
        await served.stop(0.2)
        assert time.monotonic() - started < 10  # the step hangs for 60
        assert (await task)[-1] == Failed("the server is shutting down")


async def test_stopping_fails_unfinished_requests() -> None:
    engine = make_engine(family("llama"))
    async with serving(engine) as served:
        task = asyncio.create_task(answer(served, greedy([1], 200)))
        await eventually(lambda: engine.has_work)
    assert isinstance((await task)[-1], Failed)


async def test_a_step_calls_the_event_loop_at_most_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(family("llama"))
    async with serving(engine) as served:
        crossings = []
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def counted(*args: object) -> object:
            crossings.append(args)
            return call(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        await asyncio.gather(*(answer(served, greedy([i], 20)) for i in range(8)))
        assert 0 < len(crossings) <= engine.num_steps


async def test_events_are_sent_between_the_next_launch_and_the_wait_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(family("llama"))
    calls: list[str] = []

    def record(owner: object, name: str) -> None:
        method = getattr(owner, name)

        def recorded(*args: object, **kwargs: object) -> object:
            calls.append(name)
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    async with serving(engine) as served:
        for owner, name in (
            (engine.pipeline, "launch"),
            (engine.pipeline, "collect"),
            (served._outbox, "send"),
        ):
            record(owner, name)
        assert len(await answer(served, greedy([1, 2], 4))) == 5
    first, *between, last = [i for i, name in enumerate(calls) if name == "send"]
    for sent in (first, *between):
        assert (calls[sent - 1], calls[sent + 1]) == ("launch", "collect")
    assert calls[last - 1] == "collect"  # nothing is left to launch


@pytest.mark.parametrize("failing", range(2, 9))
async def test_no_event_is_lost_where_a_launch_fails(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nothing is launched until the step is collected, and events are sent all the same."""
    engine = make_engine(family("llama"))
    launch, numbers = engine._executor.launch, itertools.count(1)

    def fail_once(batch: Batch) -> LaunchedStep:
        if next(numbers) == failing:
            raise MemoryError("on the host")
        return launch(batch)

    monkeypatch.setattr(engine._executor, "launch", fail_once)
    requests = [greedy([1, 2], 4), greedy([3, 4], 5), greedy([5, 6], 6)]
    async with serving(engine) as served, asyncio.timeout(30):
        answers = await asyncio.gather(*(answer(served, request) for request in requests))
    complete = [isinstance(events[-1], Finished) for events in answers]
    assert complete[:2] == [True, True]
    assert complete[2] or failing >= 6, "from then on it is alone, and the one that fails"
    for request, events in zip(requests, answers, strict=True):
        if isinstance(events[-1], Finished):
            assert len(events) == request.stopping.max_new_tokens + 1
