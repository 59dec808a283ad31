"""Behind the platform's stock PyWorker: what it takes for its model server.

It reads a log to learn that requests are served, and truncates that log when it starts; so a
line that it missed has to be said again.
"""

import asyncio
import sys
from pathlib import Path

from api.telemetry.logs import connected
from engine.async_engine import AsyncEngine

_REPEAT_S = 15.0


def log_file(path: Path) -> Path | None:
    """Where lines are to be appended to; None where the standard output goes there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    out = sys.stdout.fileno()
    return None if path.samefile(f"/proc/self/fd/{out}") else path


async def repeat_connected(engine: AsyncEngine) -> None:
    """Until the first request comes: then it has been heard."""
    idle = engine.status().figures.num_steps
    while engine.status().figures.num_steps == idle:
        await asyncio.sleep(_REPEAT_S)
        connected()
