"""The engine behind an event loop: a thread that runs its steps, and an inbox of messages.

Only the engine thread touches the engine. Only the event loop touches permits and `Generation`s.
They exchange messages: `_Add` and `_Abort` go to the engine through the inbox, and all events of
a step come back in one `call_soon_threadsafe`.
"""

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from engine.core.errors import EngineDead
from engine.core.metrics import (
    ColdStart,
    EngineFigures,
    EngineStatus,
    ModelInfo,
    StepFigures,
)
from engine.core.request import (
    Delivery,
    Event,
    Failed,
    Finished,
    Request,
    TokenOutput,
)
from engine.outbox import Outbox

if TYPE_CHECKING:
    from engine.engine import Engine, Events
    from engine.text.grammar import GrammarCompiler
    from engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 1e-4
"""How long the event loop may keep the interpreter lock while the engine wants it. With Python's
5 ms the engine, which gives up the lock at each call of torch, would have to wait for it through
the waking of all streams, several times in a step.
"""

_SHUTTING_DOWN = "the server is shutting down"


class Overloaded(Exception):
    """The request needs more permits than are free."""


@dataclass(frozen=True, slots=True)
class _Add:
    """Start requests that have the same prompt."""

    requests: Sequence[Request]


@dataclass(frozen=True, slots=True)
class _Abort:
    """Stop a request."""

    request_id: str


@dataclass(frozen=True, slots=True)
class _Step:
    """What a step produced."""

    events: "Events"
    figures: StepFigures | None


class Permit:
    """The right to run `count` generations at once. Leaving its `with` block gives it back."""

    def __init__(self, engine: "AsyncEngine", count: int):
        self._engine = engine
        self._count = count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._engine._free_permits += self._count


class Generation:
    """The tokens of one running request. Leaving its `with` block early aborts the request."""

    def __init__(self, engine: "AsyncEngine", request_id: str):
        self._engine = engine
        self._request_id = request_id
        self._tokens: list[TokenOutput] = []
        self._end: Finished | Failed | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.abort()

    def abort(self) -> None:
        """Stop the sequence and free its blocks before the next step. After the end, do nothing."""
        if not self._ended:
            self._ended = True
            self._engine._abort(self._request_id)

    async def deliveries(self) -> AsyncIterator[Delivery]:
        """Yield all that has arrived, as soon as there is anything. The last delivery has the
        end, unless the generation was aborted.
        """
        while not self._ended or self._tokens or self._end:
            if not self._tokens and self._end is None:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            tokens, self._tokens = self._tokens, []
            end, self._end = self._end, None
            yield Delivery(tokens, end)

    def _receive(self, event: Event) -> None:
        if isinstance(event, TokenOutput):
            self._tokens.append(event)
        else:
            self._end, self._ended = event, True
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            if not waiter.done():  # it is done if its task was cancelled
                waiter.set_result(None)


class AsyncEngine:
    """Runs an `Engine` in a thread of its own.

    All methods must be called on the event loop, except `status`, which any thread may call. If a
    step takes longer than `stall_timeout_s`, the status is "stalled". If it takes longer than
    `watchdog_timeout_s`, it counts as hung: the engine is dead, as it is when a step raises an
    error, and every request fails.
    """

    def __init__(
        self,
        engine: "Engine",
        max_concurrent_requests: int = 128,
        stall_timeout_s: float = 60.0,
        watchdog_timeout_s: float = 300.0,
    ):
        self._engine = engine
        self._free_permits = max_concurrent_requests
        self._stall_timeout_s = stall_timeout_s
        self._watchdog_timeout_s = watchdog_timeout_s
        self._generations: dict[str, Generation] = {}
        self._inbox: deque[_Add | _Abort] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="skiff-engine", daemon=True)
        # The engine thread replaces these values, and any thread may read them.
        self._busy_since: float | None = None
        self._figures: EngineFigures = engine.figures()
        self._death: str | None = None
        self._prepared = False
        self._outbox: Outbox[_Step]
        self._collected: _Step | None = None
        self.on_step: Callable[[StepFigures], None] | None = None
        """Called on the event loop with the figures of each step."""
        self.on_death: Callable[[], None] | None = None
        """Called on the event loop when the engine has died and every request has failed."""

    @property
    def tokenizer(self) -> "Tokenizer":
        return self._engine.tokenizer

    @property
    def grammars(self) -> "GrammarCompiler":
        return self._engine.grammars

    @property
    def max_total_tokens(self) -> int:
        return self._engine.limits.max_total_tokens

    @property
    def model(self) -> ModelInfo:
        return self._engine.info

    # -- event loop -------------------------------------------------------------------

    @property
    def cold_start(self) -> ColdStart:
        return self._engine.cold_start

    @property
    def is_prepared(self) -> bool:
        """Whether all preparations that need no request were done once. It never becomes false."""
        return self._prepared

    @property
    def free_permits(self) -> int:
        """The number of generations that can still be admitted."""
        return self._free_permits

    def start(self) -> None:
        """Start the engine thread, which answers to the running event loop.

        Sets how often all threads of the process may be asked for the interpreter lock.
        """
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(self._loop, self._dispatch)
        self._thread.start()
        self._watchdog = asyncio.create_task(self._watch())

    async def stop(self, timeout_s: float = 10.0) -> None:
        """End the engine thread after its current step. Unfinished requests get `Failed`.

        A step that takes longer than `timeout_s` is left to itself.
        """
        self._watchdog.cancel()
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join, timeout_s)
        if self._thread.is_alive():
            self._death = self._death or _SHUTTING_DOWN
            self._fail_all(self._death)

    def give_up(self, reason: str) -> None:
        """End every request with `Failed`. The engine keeps running."""
        for request_id in self._generations:
            self._post(_Abort(request_id))
        self._fail_all(reason)

    def admit(self, permits: int = 1) -> Permit:
        """Take permits, which are held until the generations end. Raises Overloaded."""
        if permits > self._free_permits:
            raise Overloaded
        self._free_permits -= permits
        return Permit(self, permits)

    def submit(self, request: Request) -> Generation:
        """Start a request. Raises EngineDead."""
        (generation,) = self.submit_all([request])
        return generation

    def submit_all(self, requests: Sequence[Request]) -> list[Generation]:
        """Start requests that have the same prompt, which is computed once. Raises EngineDead."""
        if self._death is not None:
            raise EngineDead(self._death)
        generations = {r.request_id: Generation(self, r.request_id) for r in requests}
        self._generations |= generations
        self._post(_Add(requests))
        return list(generations.values())

    def status(self) -> EngineStatus:
        """Return the status, judged by the progress of the steps and without waiting for one."""
        if self._death is not None:
            return EngineStatus("dead", self._death, self._figures)
        since = self._busy_since
        age = 0.0 if since is None else time.monotonic() - since
        if age > self._stall_timeout_s:
            reason = f"step {self._figures.num_steps + 1} has made no progress for {age:.0f} s"
            return EngineStatus("stalled", reason, self._figures)
        return EngineStatus("ready", None, self._figures)

    async def _watch(self) -> None:
        """Wait until a step hangs, then let the engine die.

        Only the time is counted in which this task was running, too: a process that was stopped
        and goes on has not hung.
        """
        pause_s = min(self._watchdog_timeout_s / 10, 1.0)
        watched, hung_s = None, 0.0
        while hung_s < self._watchdog_timeout_s:
            await asyncio.sleep(pause_s)
            since = self._busy_since
            hung_s = hung_s + pause_s if since is not None and since == watched else 0.0
            watched = since
        if self._death is None:
            stack = sys._current_frames().get(self._thread.ident or 0)
            where = "".join(traceback.format_stack(stack))
            logger.error("a step hangs; the engine thread is here:\n%s", where)
            self._stopping = True
            self._die(f"step {self._figures.num_steps + 1} has hung for {hung_s:.0f} s")

    def _die(self, reason: str) -> None:
        self._death = reason
        self._fail_all(reason)
        if self.on_death is not None:
            self.on_death()

    def _abort(self, request_id: str) -> None:
        self._generations.pop(request_id, None)
        self._post(_Abort(request_id))

    def _post(self, message: _Add | _Abort) -> None:
        self._inbox.append(message)
        self._wake.set()

    def _dispatch(self, step: _Step) -> None:
        """Give each generation its events of one step."""
        for request_id, event in step.events:
            generation = self._generations.get(request_id)
            if generation is None:
                continue  # aborted while the step ran
            generation._receive(event)
            if generation._ended:
                del self._generations[request_id]
        if step.figures is not None and self.on_step is not None:
            self.on_step(step.figures)

    def _fail_all(self, reason: str) -> None:
        self._outbox.empty()
        failed: Events = [(request_id, Failed(reason)) for request_id in self._generations]
        self._dispatch(_Step(failed, None))

    # -- engine thread ----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._await_work()
                with self._busy():
                    self._drain_inbox()
                    self._take_step()
                self._figures = self._engine.figures()
            self._end(self._fail_all, _SHUTTING_DOWN)
        except Exception as error:
            logger.exception("the engine died")
            self._end(self._die, str(error) or repr(error))
        finally:
            self._engine.close()

    def _await_work(self) -> None:
        while not (self._engine.has_work or self._inbox or self._stopping):
            with self._busy():
                has_captured = self._engine.capture_next_graph()
            if not has_captured:
                self._prepared = True
                self._wake.wait()
                self._wake.clear()

    def _take_step(self) -> None:
        """Run a step. Its events are sent when the next one is launched, if there is one: while
        the event loop wakes the streams, the engine waits for the device and not for the lock.
        """
        events = self._engine.step(launched=self._send)
        self._collected = _Step(events, self._engine.last_step)
        if not self._engine.has_work:
            self._send()

    def _send(self) -> None:
        step, self._collected = self._collected, None
        if self._death is None and step is not None and (step.events or step.figures):
            self._outbox.send(step)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Let the status and the watchdog see for how long the engine has been busy."""
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def _drain_inbox(self) -> None:
        while self._inbox:
            match self._inbox.popleft():
                case _Add([request, *forks]):
                    self._engine.add(request, forks)
                case _Abort(request_id):
                    self._engine.abort(request_id)

    def _end(self, fail: Callable[[str], None], reason: str) -> None:
        """Fail all accepted requests, also those that are still in the inbox.

        The event loop does it, so that no request is missed: a `submit` runs either before
        `fail`, which then fails its request, or after it and raises EngineDead.
        """
        self._send()
        if self._death is None:  # else the event loop did not wait for a step that hung
            self._death = reason
            self._loop.call_soon_threadsafe(fail, reason)
        self._engine.fail_all(reason)
