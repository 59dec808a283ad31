"""Sees a run through to its end, in as many processes as it takes.

A kernel that reads where it must not leaves no device to its process, and one that never ends
no process at all. Each costs the section it was in: another process goes on with the next.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.gpu.run import write_figures

_POLL_S = 0.5
_STOP_S = 5.0
"""For the process to clean up behind it."""


def see_through(command: Sequence[str], path: Path, until: float) -> None:
    """Start the command, which goes on with the run in `path` and ends with 0 when nothing is
    left of it, until it does. Gives up at `until`, by `time.time`, and where a process comes to
    its end without having passed any section.
    """
    while time.time() < until:
        num_passed = len(_read(path)["seconds"])
        reason, section = _watch(command, path, until)
        if reason is None:
            return
        figures = _read(path)
        if section is None and len(figures["seconds"]) == num_passed:
            section = "the run itself"
        if section is not None:
            print(f"\n{section}: {reason}", flush=True)
            figures["errors"].setdefault(section, reason)
            figures["seconds"].setdefault(section, None)
            figures["running"] = None
            write_figures(path, figures)
        if section == "the run itself":
            return


def _watch(command: Sequence[str], path: Path, until: float) -> tuple[str | None, str | None]:
    """Why the process ended too early, None where it did not, and in which section, None where
    it was in none.
    """
    process, hung = subprocess.Popen(command, start_new_session=True), False
    try:
        while process.poll() is None and not hung:
            time.sleep(_POLL_S)
            running = _read(path)["running"]
            hung = time.time() > min(until, running["until"] if running else until)
    finally:
        _end(process)
    running = running if hung else _read(path)["running"]
    section = running["section"] if running else None
    if hung:
        return "it took far too long, and was ended", section
    reason = None if process.returncode == 0 else f"its process ended with {process.returncode}"
    return reason, section


def _read(path: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def _end(process: subprocess.Popen[bytes]) -> None:
    """With whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
