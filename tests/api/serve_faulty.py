"""Runs `python -m api` with an engine that obeys a file, at its next step.

    python -m tests.api.serve_faulty FILE paced|real [--flag value ...]

A step takes the file away and does what it says:

    die    raises EngineDead, as after a fault of the device
    hang   sleeps for an hour, as in a kernel that does not end
    lock   does so without letting another thread of the interpreter run
    crash  ends the process with a segmentation fault
    kill   ends the process as the system does when memory is short

or calls the function of that name in `tests.gpu.device_faults`.

The `real` engine runs the built-in model on the CPU. The `paced` one needs no torch, makes fifty
tokens of each request in a second, and obeys while it is loaded, too.
"""

import ctypes
import importlib
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from api import __main__ as entry
from api.handover import Handover
from api.supervisor import leave, supervise


def die() -> None:
    from engine.core.errors import EngineDead

    raise EngineDead("CUDA error: an illegal memory access was encountered")


def end_by(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(10)


FAULTS: dict[str, Callable[[], object]] = {
    "die": die,
    "hang": lambda: ctypes.CDLL(None).sleep(3600),
    "lock": lambda: ctypes.PyDLL(None).sleep(3600),
    "crash": lambda: end_by(signal.SIGSEGV),
    "kill": lambda: end_by(signal.SIGKILL),
}


def obey(told: Path) -> None:
    with suppress(FileNotFoundError):
        word = told.read_text()
        told.unlink()
        fault_named(word)()


def fault_named(word: str) -> Callable[[], object]:
    if word in FAULTS:
        return FAULTS[word]
    device_faults = importlib.import_module("tests.gpu.device_faults")
    return cast(Callable[[], object], getattr(device_faults, word))


def install_paced(told: Path) -> None:
    """Have the process load an engine that needs no torch."""
    from engine.loading import hub
    from tests.api.paced import PacedEngine

    module = types.ModuleType("engine.engine")

    def load(*_: object) -> PacedEngine:
        obey(told)
        return PacedEngine(lambda: obey(told))

    module.Engine = types.SimpleNamespace(load=load)  # type: ignore[attr-defined]
    sys.modules["engine.engine"] = module
    hub.check_model_id = lambda *_: None


def install_real(told: Path) -> None:
    """Have the steps of the real engine obey."""
    from engine.engine import Engine, Events

    step = Engine.step

    def obedient(engine: Engine, **options: Callable[[], None]) -> Events:
        obey(told)
        return step(engine, **options)

    Engine.step = obedient  # type: ignore[method-assign, assignment]


def serve(argv: Sequence[str], handover: Handover | None = None) -> int:
    told, engine, *flags = argv
    install = {"paced": install_paced, "real": install_real}[engine]
    install(Path(told))
    from api.process import main

    return main(flags, handover)


if __name__ == "__main__":
    argv = sys.argv[1:]
    if entry.is_supervised(argv, os.environ):
        sys.exit(supervise(lambda handover: serve(argv, handover), entry._report_failure))
    leave(lambda: serve(argv))
