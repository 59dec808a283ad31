"""One run of `bench.gpu`: its figures, where they are written, and how long it may go on.

A run is a list of sections. What fails in one is noted, and the next begins; what the time
does not reach is listed. A section that ends with the device lost ends the process too, and
another process goes on with the next: `bench.gpu.supervisor`.
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
"""Left at the end by what stops at the deadline by itself."""


class DeviceLost(Exception):
    """Nothing more can be done on it in this process."""


class NothingToMeasure(Exception):
    """A section cannot be measured here, which is no failure; the reason."""


@dataclass(frozen=True, slots=True)
class Section:
    """Something to be measured; `needs_s` is about what it takes on an H200."""

    name: str
    work: Callable[[], None]
    needs_s: float

    @property
    def limit_s(self) -> float:
        """After which it is taken to hang, be it in a process that has to load the model anew."""
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
        """Since the run was begun, in whichever process."""
        started = datetime.datetime.fromisoformat(self.figures["started"]).timestamp()
        return self.scale.seconds - (time.time() - started)

    def deadline(self, most_s: float = float("inf")) -> float:
        """For what can stop by itself, with `most_s` to go at most; `time.perf_counter`'s."""
        return time.perf_counter() + min(self.seconds_left - _MARGIN_S, most_s)

    def has_time(self, name: str, needs_s: float = 0.0) -> bool:
        """Whether there is; else it is listed. A CPU is only for trying: it takes its time."""
        needs_s = needs_s if self.on_cuda else 0.0
        if self.seconds_left > needs_s:
            return True
        reason = f"takes some {needs_s:.0f} s, and {max(self.seconds_left, 0):.0f} are left"
        self.skip(name, reason)
        return False

    def skip(self, name: str, reason: str) -> None:
        self.figures["skipped"].append({"section": name, "reason": reason})

    def fail(self, name: str, error: Exception) -> None:
        """Raises DeviceLost where it leaves no device to go on with."""
        self.figures["errors"][name] = f"{type(error).__name__}: {error}"[:500]
        if self.on_cuda:
            try:
                torch.cuda.synchronize()
            except RuntimeError as lost:
                raise DeviceLost(str(lost)) from error

    def measure(self, sections: list[Section]) -> None:
        """All that were not reached before. Raises DeviceLost."""
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
        """Give back what is not used any more; a device that is lost has said so already."""
        gc.collect()
        if self.on_cuda:
            with suppress(RuntimeError):
                torch.cuda.empty_cache()

    def write(self) -> None:
        """Whole or not at all: a run may be killed at any moment."""
        write_figures(self.path, self.figures)

    @contextmanager
    def logged(self) -> Iterator[None]:
        """What the engine logs goes with the figures: which fusions it found, what it could not
        do.
        """
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
    lists = ("models", "kernels", "decode", "prefill", "steady", "end_to_end")
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
