"""What a server leaves to the supervisor, and to the server that is started after it."""

import mmap
import struct
import time

_SLOT_BYTES = 1 << 24
"""Room for the books. Pages that are never written take no memory."""
_HEAD = struct.Struct("=ddB")
_LENGTH = struct.Struct("=Q")


class Handover:
    """Memory that a process shares with those that it forks. It outlives a server that dies at
    any moment, even while it writes here.

    ready_since    when the running server became ready, on the clock of `time.monotonic`, which
                   is the same in all processes; 0 before
    termination_s  most seconds from SIGTERM to the end of the running server
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE + 2 * _SLOT_BYTES)
        self.begin()

    def begin(self) -> None:
        """Forget what only concerns the server before. The books stay."""
        self._set_head(ready_since=0.0, termination_s=10.0)

    @property
    def ready_since(self) -> float:
        return self._head[0]

    @property
    def termination_s(self) -> float:
        return self._head[1]

    @termination_s.setter
    def termination_s(self, seconds: float) -> None:
        self._set_head(termination_s=seconds)

    def mark_ready(self) -> None:
        self._set_head(ready_since=time.monotonic())

    @property
    def books(self) -> bytes:
        """What the last `write_books` wrote, by whichever server; empty before."""
        start = self._slot(self._head[2])
        (length,) = _LENGTH.unpack_from(self._memory, start)
        return self._memory[start + _LENGTH.size : start + _LENGTH.size + length]

    def write_books(self, books: bytes) -> None:
        """Replace the books, at once and as a whole. Raises ValueError above 16 MiB."""
        if len(books) > _SLOT_BYTES - _LENGTH.size:
            raise ValueError("the books are too long")
        other = 1 - self._head[2]
        start = self._slot(other)
        _LENGTH.pack_into(self._memory, start, len(books))
        self._memory[start + _LENGTH.size : start + _LENGTH.size + len(books)] = books
        self._set_head(slot=other)

    @property
    def _head(self) -> tuple[float, float, int]:
        ready_since, termination_s, slot = _HEAD.unpack_from(self._memory)
        return ready_since, termination_s, slot

    def _set_head(
        self,
        ready_since: float | None = None,
        termination_s: float | None = None,
        slot: int | None = None,
    ) -> None:
        old = self._head
        new = (ready_since, termination_s, slot)
        _HEAD.pack_into(
            self._memory, 0, *(o if n is None else n for o, n in zip(old, new, strict=True))
        )

    def _slot(self, number: int) -> int:
        return mmap.PAGESIZE + number * _SLOT_BYTES
