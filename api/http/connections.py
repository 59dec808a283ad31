"""The open connections: how long each may keep the server waiting, and which is closed if there
are too many.

A connection is in one phase at a time. In each phase but one the server waits for the client, and
not for longer than `Patience` says. `ANSWER` is the exception: however long a generation takes, its
connection is not idle.
"""

import logging
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Protocol

import psutil

_MOST = 8192
"""Most connections, however many files the process may open: each of them needs memory."""
_FEWEST = 16
_GRACE_S = 1.0
"""Seconds in which a connection is closed only if none waits longer. Without them, clients with
half a body could have every new connection closed before its request is read.
"""
SWEEP_INTERVAL_S = 1.0
_LOG_INTERVAL_S = 60.0

logger = logging.getLogger(__name__)


class Phase(IntEnum):
    """What a connection is waiting for."""

    HANDSHAKE = auto()
    """The client finishes the handshake of TLS."""
    IDLE = auto()
    """The client sends a request, its first or its next."""
    HEAD = auto()
    """The client sends the rest of a request's headers."""
    BODY = auto()
    """The client sends the rest of a request's body."""
    ANSWER = auto()
    """The server answers."""
    UNREAD = auto()
    """The client reads what has been sent, before the server can send more."""
    DROPPED = auto()
    """The client sends the rest of a request that has been answered, which is dropped."""
    CLOSING = auto()
    """The client reads the last bytes before the connection closes."""


_MAY_GO_ON = frozenset((Phase.BODY, Phase.UNREAD, Phase.CLOSING))
"""Phases that may last, as long as the client does something."""
_IN_WHICH_TO_CLOSE = (
    (Phase.HANDSHAKE, Phase.IDLE, Phase.HEAD, Phase.DROPPED, Phase.CLOSING),
    (Phase.BODY,),
    (Phase.UNREAD,),
)
"""Of too many connections, one in the first of these groups is closed before one in the next."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How many seconds a client may take; `least_rate` is in bytes per second.

    Bodies and answers may take longer, as long as they go on at the least rate.
    """

    handshake_s: float = 10.0
    idle_s: float = 75.0
    """Proxies keep idle connections for 60 s. They should be the ones to close them."""
    head_s: float = 30.0
    body_s: float = 30.0
    unread_s: float = 60.0
    dropped_s: float = 30.0
    closing_s: float = 10.0
    least_rate: float = 500.0

    def seconds(self, phase: Phase) -> float:
        return float(getattr(self, f"{phase.name.lower()}_s"))


class Tracked(Protocol):
    """A connection, for `Connections`."""

    def progress(self, phase: Phase) -> int:
        """Return a number of bytes that grows while the client does what `phase` waits for."""

    def expire(self, phase: Phase) -> None:
        """End the connection, since its client took too long."""

    def drop(self) -> None:
        """Close the connection at once, to free its file descriptor."""


@dataclass(slots=True)
class _Waiting:
    phase: Phase = Phase.HANDSHAKE
    since: float = 0.0
    """When the phase began, by `time.monotonic`, or the part of it in which the client went on."""
    progress: int = 0


class Connections:
    """All open connections, ordered within each phase by how long they are in it."""

    def __init__(self, limit: int, patience: Patience) -> None:
        self.limit = limit
        self.patience = patience
        self._waiting: dict[Tracked, _Waiting] = {}
        self._in_phase: dict[Phase, dict[Tracked, _Waiting]] = {phase: {} for phase in Phase}
        self._logged_at = float("-inf")
        self._swept_at = time.monotonic()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        return len(self) >= self.limit

    def enter(self, connection: Tracked, phase: Phase) -> None:
        """Put a connection, new or not, into a phase that begins now."""
        waiting = self._waiting.get(connection)
        if waiting is None:
            waiting = self._waiting[connection] = _Waiting()
        else:
            del self._in_phase[waiting.phase][connection]
        waiting.phase = phase
        waiting.since = time.monotonic()
        if phase in _MAY_GO_ON:
            waiting.progress = connection.progress(phase)
        self._in_phase[phase][connection] = waiting

    def remove(self, connection: Tracked) -> None:
        waiting = self._waiting.pop(connection, None)
        if waiting is not None:
            del self._in_phase[waiting.phase][connection]

    def sweep(self) -> None:
        """End the connections whose clients took too long. To be called every `SWEEP_INTERVAL_S`.

        If it comes late, the process had been stopped or busy. The clients get that time back.
        """
        now = time.monotonic()
        late_s = now - self._swept_at - SWEEP_INTERVAL_S
        self._swept_at = now
        if late_s > SWEEP_INTERVAL_S:
            for waiting in self._waiting.values():
                waiting.since += late_s
        for connection, waiting in list(self._overdue(now)):
            needed = self.patience.least_rate * self.patience.seconds(waiting.phase)
            if (
                waiting.phase in _MAY_GO_ON
                and connection.progress(waiting.phase) - waiting.progress >= needed
            ):
                self.enter(connection, waiting.phase)
            else:
                connection.expire(waiting.phase)

    def _overdue(self, now: float) -> Iterator[tuple[Tracked, _Waiting]]:
        for phase, connections in self._in_phase.items():
            if phase is Phase.ANSWER:
                continue
            latest = now - self.patience.seconds(phase)
            for connection, waiting in connections.items():
                if waiting.since > latest:
                    break
                yield connection, waiting

    def make_room(self) -> None:
        """Close those that wait longest, until there is room for one more."""
        while len(self) >= self.limit:
            connection = self._most_idle()
            if connection is None:
                return
            self._log()
            self.remove(connection)
            connection.drop()

    def shrink(self) -> None:
        """Make do with fewer connections, since the process could not open another file."""
        self.limit = max(_FEWEST, min(self.limit, len(self) - 1))
        self.make_room()

    def _most_idle(self) -> Tracked | None:
        longest = [
            [next(iter(self._in_phase[phase].items())) for phase in phases if self._in_phase[phase]]
            for phases in _IN_WHICH_TO_CLOSE
        ]
        latest = time.monotonic() - _GRACE_S
        for group in longest:
            if any(waiting.since <= latest for _, waiting in group):
                return _first(group)
        return _first([entry for group in longest for entry in group])

    def _log(self) -> None:
        """Log once, and not for every connection: there may be thousands a second."""
        now = time.monotonic()
        if now - self._logged_at >= _LOG_INTERVAL_S:
            self._logged_at = now
            logger.warning(
                "%d connections are open, which is the limit: for each new one, the one that has "
                "been idle longest is closed",
                len(self),
            )


def _first(entries: list[tuple[Tracked, _Waiting]]) -> Tracked | None:
    """Return the connection that has waited longest, or None if there is none."""
    return min(entries, key=lambda entry: entry[1].since)[0] if entries else None


def raise_file_limit() -> None:
    """Let the process open as many files as the system allows it to: a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        logger.warning("no more than %d files can be open: %s", soft, error)


def connection_limit() -> int:
    """Return how many connections the limit on open files allows, next to the files that are open
    now and a reserve for others.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST
    reserve = min(256, soft // 8)
    return max(_FEWEST, min(_MOST, soft - psutil.Process().num_fds() - reserve))
