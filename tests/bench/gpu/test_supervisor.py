"""A run that breaks off: another process goes on with what is left of it."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.supervisor import see_through

_CHILD = """
import json, os, sys, time
path, work = sys.argv[1:]
figures = json.load(open(path))
def write():
    with open(path + ".new", "w") as file:
        json.dump(figures, file)
    os.replace(path + ".new", path)
for name in ("first", "second", "third"):
    if name not in figures["seconds"]:
        figures["running"] = {"section": name, "until": time.time() + (1 if work == "hang" else 60)}
        write()
        if name == "second":
            exec({"die": "os._exit(9)", "hang": "time.sleep(60)", "lose": "pass"}[work])
        figures["seconds"][name] = 0.1
        figures["running"] = None
        write()
        if name == "second" and work == "lose":
            sys.exit(3)
"""


def seen_through(folder: Path, work: str) -> dict[str, Any]:
    path = folder / "run.json"
    path.write_text(json.dumps({"seconds": {}, "errors": {}, "running": None}))
    command = [sys.executable, "-c", _CHILD, str(path), work]
    see_through(command, path, time.time() + 60)
    figures: dict[str, Any] = json.loads(path.read_text())
    assert figures["running"] is None
    return figures


@pytest.mark.slow
def test_a_process_that_dies_costs_the_section_it_was_in(tmp_path: Path) -> None:
    figures = seen_through(tmp_path, "die")
    assert figures["seconds"] == {"first": 0.1, "second": None, "third": 0.1}
    assert figures["errors"] == {"second": "its process ended with 9"}


@pytest.mark.slow
def test_a_section_that_hangs_is_ended(tmp_path: Path) -> None:
    figures = seen_through(tmp_path, "hang")
    assert figures["seconds"] == {"first": 0.1, "second": None, "third": 0.1}
    assert figures["errors"] == {"second": "it took far too long, and was killed"}


@pytest.mark.slow
def test_a_process_that_lost_the_device_is_followed_by_another(tmp_path: Path) -> None:
    figures = seen_through(tmp_path, "lose")
    assert figures["seconds"] == {"first": 0.1, "second": 0.1, "third": 0.1}
    assert figures["errors"] == {}


def test_a_process_that_gets_nowhere_is_the_last(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"seconds": {}, "errors": {}, "running": None}))
    see_through([sys.executable, "-c", "raise SystemExit(1)"], path, time.time() + 60)
    figures = json.loads(path.read_text())
    assert figures["errors"] == {"the run itself": "its process ended with 1"}
