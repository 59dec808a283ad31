"""Run a benchmark to its end, in as many processes as it takes.

A kernel with an illegal memory access makes the device unusable for its process, and a kernel
that never ends hangs the process. Either one loses the current section only: another process
continues with the next section.
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
"""How long a process may take to clean up."""


def see_through(command: Sequence[str], path: Path, until: float) -> None:
    """Start the command again and again, until it ends with 0, which means that the run is done.

    The command continues the run in `path`. Gives up at `until`, a `time.time` time, and when a
    process ends without completing a section.
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
    """Run the command once. Return why it ended too early, and in which section.

    The reason is None if the process ended properly, the section None if it was in none.
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
        return "it took far too long, and was killed", section
    reason = None if process.returncode == 0 else f"its process ended with {process.returncode}"
    return reason, section


def _read(path: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and everything that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
