"""The server as its users start it: a process of its own, in its own environment."""

import os
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv" / "bin" / "python"
READY = re.compile(r"Ready on [\d.]+:(\d+)")

MAX_CONCURRENT_REQUESTS = 32
MAX_TOTAL_TOKENS = 512  # an answer without a limit ends before the patience of a test
FLAGS = {
    "--hostname": "127.0.0.1",
    "--port": "0",
    "--dtype": "float32",  # whatever the processor prefers, the snapshots are of this
    "--max-concurrent-requests": str(MAX_CONCURRENT_REQUESTS),
    "--max-total-tokens": str(MAX_TOTAL_TOKENS),
}
SETTINGS = (
    *("MODEL_ID", "REVISION", "API_KEY", "PORT", "HOSTNAME", "QUANTIZE", "JSON_OUTPUT"),
    *("CONTAINER_ID", "MASTER_TOKEN", "REPORT_ADDR", "BACKEND", "MODEL_LOG", "UNSECURED"),
)
"""Not taken from the environment that the tests run in."""


@dataclass
class Server:
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    port: int = 0
    ready: threading.Event = field(default_factory=threading.Event)
    copy_to: Path | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def read(self) -> None:
        """To the end of its output, or its pipe would fill and stop it."""
        for line in self.process.stdout or ():
            self.log.append(line)
            if self.copy_to:
                with self.copy_to.open("a") as copy:
                    copy.write(line)
            if found := READY.search(line):
                self.port = int(found[1])
                self.ready.set()
        self.ready.set()

    def said(self) -> str:
        return "".join(self.log)

    def check_it_left_in_good_order(self) -> None:
        code = self.process.returncode
        assert code == 0, f"the server ended with {code}:\n{self.said()}"
        assert "Traceback" not in self.said(), self.said()


def command(*flags: str, **changes: str) -> list[str]:
    """`command("--json-output", port="8080")`, with the flags that every test has."""
    table = FLAGS | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return [str(PYTHON), "-m", "api", *(x for pair in table.items() for x in pair), *flags]


@contextmanager
def started(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    copy_to: Path | None = None,
) -> Iterator[Server]:
    """A process until the block ends, its output read, and copied to a file if need be."""
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=inherited | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = Server(process, copy_to=copy_to)
    reader = threading.Thread(target=server.read, daemon=True)
    reader.start()
    try:
        yield server
    finally:
        process.terminate()
        process.wait(120)
        reader.join(10)


@contextmanager
def serve(*flags: str) -> Iterator[Server]:
    """A server until the block ends; it must leave in good order, having raised nothing."""
    with started(command(*flags)) as server:
        server.ready.wait(240)
        assert server.port, f"the server did not become ready:\n{server.said()}"
        yield server
    server.check_it_left_in_good_order()
