"""Runs `tests.api.serve_faulty` for tests, and says what its processes do."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_S = 240.0
"""Most seconds that a start may take on a machine with much else to do."""


@dataclass
class FaultyServer:
    """A server with its supervisor, if it has one, and all that they have printed."""

    process: subprocess.Popen[str]
    told: Path
    lines: list[str] = field(default_factory=list)

    def obey(self, fault: str) -> None:
        """Have the next step do what `serve_faulty` says about `fault`."""
        written = self.told.with_suffix(".new")
        written.write_text(fault)
        written.replace(self.told)

    def read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line)

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def await_ready(self, times: int = 1) -> str:
        """Wait until it was ready so many times, and return the URL of the last one."""
        self.wait(lambda: len(self.urls) >= times)
        return self.urls[times - 1]

    @property
    def urls(self) -> list[str]:
        return [
            f"http://{found}" for found in re.findall(r"^Ready .* curl (\S+)/g", self.said, re.M)
        ]

    def wait(self, condition: Callable[[], object], seconds: float = START_S) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def children(self) -> list[int]:
        pid = self.process.pid
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]

    def end(self, seconds: float = 30.0) -> int:
        """Wait for the end and return the exit status."""
        return self.process.wait(seconds)


@contextmanager
def faulty_server(
    folder: Path, *flags: str, engine: str = "paced", environment: Mapping[str, str] | None = None
) -> Iterator[FaultyServer]:
    """Run a server on a free port of this machine, until the block ends."""
    told = folder / "told"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.api.serve_faulty", str(told), engine, *flags],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"} | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = FaultyServer(process, told)
    reader = threading.Thread(target=server.read, daemon=True)
    reader.start()
    try:
        yield server
    finally:
        process.kill()
        process.wait()
        reader.join(30)
