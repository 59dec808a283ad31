"""Starts the server as a child process, and starts it again when its engine has died.

A GPU's state in a process cannot be repaired after a fault, and a kernel that hangs cannot be
stopped, so the process has to end. This one stays. It passes signals on and ends with the server's
exit status, and it takes the place of init in a container, where it is the first process.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from api.handover import Handover

LOST = 86
"""Exit status of a server whose engine has died: the device was lost, or a step did not end. No
other program uses it: it is none of sysexits, of shells, of container runtimes or of systemd.
"""

_MAX_RESTARTS = 5
"""Restarts in a row, without a server that stayed ready for `_STEADY_S`, before giving up."""
_STEADY_S = 600.0
_PAUSE_S = 0.5
"""Seconds before the first restart. Each further one in a row waits twice as long."""
_KILL_S = 0.5
"""A server that does not end in the time that it asked for is killed this long after it."""
_ABANDON_S = 5.0
"""A killed server that the system cannot end, because its driver hangs, is left behind after it."""
_STOPS = (signal.SIGTERM, signal.SIGINT)
_FORWARDED = (*_STOPS, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_SET_PDEATHSIG = 1
"""PR_SET_PDEATHSIG of prctl(2): the signal that a process gets when its parent ends."""

Serve = Callable[[Handover], int]
"""Serves until a signal, in a process of its own, and returns the exit status."""


def supervise(serve: Serve, report_failure: Callable[[str], int]) -> int:
    """Run `serve` until it ends for good, and return the exit status.

    If it dies too often, or dies while it starts, `report_failure` gets the reason, in a process
    of its own that may take as long as it likes.
    """
    return _Supervisor(serve, report_failure).run()


def leave(work: Callable[[], int]) -> NoReturn:
    """Do `work` and end the process with the status that it returns. The interpreter's own end is
    left out: it would wait for the device and the threads of an engine that hangs.
    """
    status = 1
    try:
        status = work()
    except SystemExit as end:
        status = _status_of(end)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def _status_of(end: SystemExit) -> int:
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
        return 1
    return end.code or 0


class _Supervisor:
    def __init__(self, serve: Serve, report_failure: Callable[[str], int]) -> None:
        self._serve = serve
        self._report_failure = report_failure
        self._handover = Handover()
        self._child = 0
        self._is_stopping = False
        self._overdue_at = float("inf")
        self._num_restarts = 0
        # Signals are only taken where this process waits for them, so that none is missed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, children leave no status
        waited = {signal.SIGCHLD, *_FORWARDED}
        self._old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
        self._waited = waited

    def run(self) -> int:
        while True:
            status = self._run_server()
            died = None if self._is_stopping else self._death(status)
            if died is None:
                return 0 if self._is_stopping and -status in _STOPS else _exit_status(status)
            if not self._may_restart(status):
                return self._give_up(died, status)
            if not self._pause(died):
                return 0

    def _run_server(self) -> int:
        self._handover.begin()
        self._fork(lambda: self._serve(self._handover))
        status = self._wait()
        ready_since = self._handover.ready_since
        if ready_since and time.monotonic() - ready_since > _STEADY_S:
            self._num_restarts = 0
        return status

    def _death(self, status: int) -> str | None:
        """Return what a server died of that did not end by itself; a negative `status` is a
        signal's number. None if it ended by itself, or because someone told it to.
        """
        if status == LOST:
            return "its engine died"
        if status < 0 and -status not in _FORWARDED:
            return f"signal {-status} ({signal.strsignal(-status)})"
        return None

    def _may_restart(self, status: int) -> bool:
        """Whether a server that died should be started again. One that dies of a signal before it
        is ready would do so again.
        """
        was_ready = status == LOST or self._handover.ready_since > 0
        return was_ready and self._num_restarts < _MAX_RESTARTS

    def _pause(self, died: str) -> bool:
        """Wait before the next start; False if a signal says to stop meanwhile."""
        seconds = _PAUSE_S * 2**self._num_restarts
        self._num_restarts += 1
        _say(
            f"the server died ({died}): starting it again in {seconds:g} s, "
            f"restart {self._num_restarts} of at most {_MAX_RESTARTS} in a row"
        )
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._next_signal(left) in _STOPS:
                return False
            self._reap()
        return True

    def _give_up(self, died: str, status: int) -> int:
        reason = f"the server died ({died}), and starting it again does not help"
        _say(reason)
        self._handover.begin()
        self._fork(lambda: self._report_failure(reason))
        self._wait()
        return 0 if self._is_stopping else _exit_status(status)

    # -- the child process ----------------------------------------------------------

    def _fork(self, work: Callable[[], int]) -> None:
        parent = os.getpid()
        self._child = os.fork()
        if self._child == 0:
            os.setpgid(0, 0)  # a terminal's ^C comes once: from here, not from the terminal, too
            _die_with(parent)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._old_mask)
            leave(work)

    def _wait(self) -> int:
        """Wait for the child's end and return its status. Pass signals on until then."""
        while (status := self._reap()) is None:
            left = self._overdue_at - time.monotonic()
            if left <= 0:
                return self._kill()
            number = self._next_signal(min(left, 3600.0))
            if number in _FORWARDED:
                self._forward(number)
        return status

    def _reap(self) -> int | None:
        """Take the status of all children that have ended, also of those that the system gave to
        the first process of a container. Return the server's if it is among them.
        """
        found = None
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._child:
                    found = os.waitstatus_to_exitcode(ended[1])
        return found

    def _next_signal(self, seconds: float) -> int:
        """Return the number of the next signal; 0 if there is none in that time."""
        info = signal.sigtimedwait(self._waited, seconds)
        return 0 if info is None else info.si_signo

    def _forward(self, number: int) -> None:
        os.kill(self._child, number)
        if number in _STOPS and not self._is_stopping:
            self._is_stopping = True
            self._overdue_at = time.monotonic() + self._handover.termination_s + _KILL_S

    def _kill(self) -> int:
        """End a server that does not end by itself, not even when told to."""
        _say("the server does not end: it is killed")
        os.kill(self._child, signal.SIGKILL)
        end = time.monotonic() + _ABANDON_S
        while self._reap() is None and time.monotonic() < end:
            self._next_signal(0.1)
        return -signal.SIGKILL


def _die_with(parent: int) -> None:
    """Have the system kill this process when its parent ends, however that comes about."""
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def _exit_status(status: int) -> int:
    """Return the exit status for a child's, in which a negative number is a signal's."""
    return 128 - status if status < 0 else status


def _say(text: str) -> None:
    with suppress(OSError):
        print(f"supervisor: {text}", file=sys.stderr, flush=True)
