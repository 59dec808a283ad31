"""Running as the model server behind Vast's stock PyWorker.

The PyWorker learns from a log file that the model server is ready. It truncates that file when it
starts, so the line that it waits for has to be repeated.
"""

import asyncio
import sys
from pathlib import Path

from api.settings.config import ConfigError
from api.settings.launcher_flags import flag_of
from api.telemetry.logs import connected
from engine.async_engine import AsyncEngine

_REPEAT_S = 15.0


def log_file(path: Path) -> Path | None:
    """Create the log file and return its path; None if standard output goes there already. Raises
    ConfigError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"{flag_of('model_log')} {path}: {error.strerror}") from None
    out = sys.stdout.fileno()
    return None if path.samefile(f"/proc/self/fd/{out}") else path


async def repeat_connected(engine: AsyncEngine) -> None:
    """Repeat the line "Connected" until the first request shows that the PyWorker read it."""
    idle = engine.status().figures.num_steps
    while engine.status().figures.num_steps == idle:
        await asyncio.sleep(_REPEAT_S)
        connected()
