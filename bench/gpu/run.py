"""One run of `bench.gpu`: its figures, where they are written, and how much time it has.

A run is a list of sections. If a section fails, the failure is recorded and the next section
begins; sections that do not fit into the time are listed. If a section loses the device, the
process ends, and `bench.gpu.supervisor` continues in another process.
"""

import datetime
import gc
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

from bench.gpu.scales import Scale

_MARGIN_S = 10.0
"""How long before the end of the run its deadlines are."""


class DeviceLost(Exception):
    """The device can no longer be used in this process."""


class NothingToMeasure(Exception):
    """A section cannot be measured here, which is not a failure. The message is the reason."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a run; `needs_s` is about how long it takes on an H200."""

    name: str
    work: Callable[[], None]
    needs_s: float

    @property
    def limit_s(self) -> float:
        """When a section is considered hung, even if its process has to load the model again."""
        return 2 * self.needs_s + 90


@dataclass
class Run:
    device: torch.device
    dtype: torch.dtype
    scale: Scale
    path: Path
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        """Seconds left of the run, which may have begun in another process."""
        started = datetime.datetime.fromisoformat(self.figures["started"]).timestamp()
        return self.scale.seconds - (time.time() - started)

    def deadline(self, most_s: float = float("inf")) -> float:
        """Return the `time.perf_counter` time at which work must stop, at most `most_s` ahead."""
        return time.perf_counter() + min(self.seconds_left - _MARGIN_S, most_s)

    def has_time(self, name: str, needs_s: float = 0.0) -> bool:
        """Return whether `needs_s` seconds are left; if not, list the section as skipped.

        Runs on a CPU only test the run, and may take longer.
        """
        needs_s = needs_s if self.on_cuda else 0.0
        if self.seconds_left > needs_s:
            return True
        reason = f"takes some {needs_s:.0f} s, and {max(self.seconds_left, 0):.0f} are left"
        self.skip(name, reason)
        return False

    def skip(self, name: str, reason: str) -> None:
        self.figures["skipped"].append({"section": name, "reason": reason})

    def fail(self, name: str, error: Exception) -> None:
        """Record a failure. Raises DeviceLost if the device can no longer be used."""
        self.figures["errors"][name] = f"{type(error).__name__}: {error}"[:500]
        if self.on_cuda:
            try:
                torch.cuda.synchronize()
            except RuntimeError as lost:
                raise DeviceLost(str(lost)) from error

    def measure(self, sections: list[Section]) -> None:
        """Measure the sections that this run has not measured or skipped. Raises DeviceLost."""
        passed = {entry["section"] for entry in self.figures["skipped"]}
        for section in sections:
            if section.name not in passed and section.name not in self.figures["seconds"]:
                self.section(section)

    def section(self, section: Section) -> None:
        name = section.name
        if not self.has_time(name, section.needs_s):
            return
        print(f"[{self.scale.seconds - self.seconds_left:5.0f} s] {name} ", end="", flush=True)
        self.figures["running"] = {"section": name, "until": time.time() + section.limit_s}
        self.write()
        started = time.perf_counter()
        try:
            section.work()
        except NothingToMeasure as reason:
            self.skip(name, str(reason))
        except Exception as error:
            print(f"FAILED {type(error).__name__}: {error} "[:500], end="", flush=True)
            self.fail(name, error)
        finally:
            seconds = time.perf_counter() - started
            self.figures["seconds"][name] = round(seconds, 2)
            self.figures["running"] = None
            self.write()
            print(f"{seconds:.1f} s", flush=True)
        self.release()

    def release(self) -> None:
        """Free unused memory. Errors of a lost device were reported before."""
        gc.collect()
        if self.on_cuda:
            with suppress(RuntimeError):
                torch.cuda.empty_cache()

    def write(self) -> None:
        """Write the figures atomically, as a run may be killed at any moment."""
        write_figures(self.path, self.figures)

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Add the engine's log to the figures, such as which fusions it found."""
        logger, handler = logging.getLogger("engine"), _Keep(self.figures["log"])
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)


class _Keep(logging.Handler):
    def __init__(self, lines: list[str]):
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(f"{record.levelname} {record.getMessage()}")


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(figures, indent=1) + "\n")
    unfinished.replace(path)


def new_figures(device: torch.device, scale: Scale) -> dict[str, Any]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }
    lists = ("models", "kernels", "decode", "prefill", "mixed", "graphs", "steady", "end_to_end")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": versions,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "scale": scale.name,
        "ceilings": None,
        **{name: [] for name in lists},
        "first_token": None,
        "cold_start": [],
        "skipped": [],
        "errors": {},
        "seconds": {},
        "running": None,
        "log": [],
    }
