"""Starts the server as users do: as a separate process in its own Python environment."""

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
MAX_TOTAL_TOKENS = 512  # keeps answers without a limit short
FLAGS = {
    "--hostname": "127.0.0.1",
    "--port": "0",
    "--dtype": "float32",  # the snapshots were made with it, whatever the processor prefers
    "--max-concurrent-requests": str(MAX_CONCURRENT_REQUESTS),
    "--max-total-tokens": str(MAX_TOTAL_TOKENS),
}
SETTINGS = (
    *("MODEL_ID", "REVISION", "API_KEY", "PORT", "HOSTNAME", "QUANTIZE", "JSON_OUTPUT"),
    *("CONTAINER_ID", "MASTER_TOKEN", "REPORT_ADDR", "BACKEND", "MODEL_LOG", "UNSECURED"),
)
"""Variables that are not inherited from the environment of the tests."""


@dataclass
class Server:
    """A running server process and its output so far."""

    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    port: int = 0
    ready: threading.Event = field(default_factory=threading.Event)
    copy_to: Path | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def read_output(self) -> None:
        """Read the output to its end. Otherwise the pipe would fill and block the process."""
        for line in self.process.stdout or ():
            self.log.append(line)
            if self.copy_to:
                with self.copy_to.open("a") as copy:
                    copy.write(line)
            if found := READY.search(line):
                self.port = int(found[1])
                self.ready.set()
        self.ready.set()

    def output(self) -> str:
        return "".join(self.log)

    def check_clean_exit(self) -> None:
        code = self.process.returncode
        assert code == 0, f"the server ended with {code}:\n{self.output()}"
        assert "Traceback" not in self.output(), self.output()


def command(*flags: str, **changes: str) -> list[str]:
    """Return the command line with the common flags, for example
    `command("--json-output", port="8080")`.
    """
    table = FLAGS | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return [str(PYTHON), "-m", "api", *(x for pair in table.items() for x in pair), *flags]


@contextmanager
def started(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    copy_to: Path | None = None,
) -> Iterator[Server]:
    """Run a process until the block ends. Its output is read, and copied to `copy_to` if given."""
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
    reader = threading.Thread(target=server.read_output, daemon=True)
    reader.start()
    try:
        yield server
    finally:
        process.terminate()
        process.wait(120)
        reader.join(10)


@contextmanager
def serve(*flags: str) -> Iterator[Server]:
    """Run a server until the block ends. It must then exit cleanly and have logged no exception."""
    with started(command(*flags)) as server:
        server.ready.wait(240)
        assert server.port, f"the server did not become ready:\n{server.output()}"
        yield server
    server.check_clean_exit()
