"""The server as its users start it: a process of its own, in its own environment."""

import os
import re
import subprocess
import threading
from collections.abc import Iterator
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
SETTINGS = ("MODEL_ID", "REVISION", "API_KEY", "PORT", "HOSTNAME", "QUANTIZE", "JSON_OUTPUT")


@dataclass
class Server:
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    port: int = 0
    ready: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def read(self) -> None:
        """To the end of its output, or its pipe would fill and stop it."""
        for line in self.process.stdout or ():
            self.log.append(line)
            if found := READY.search(line):
                self.port = int(found[1])
                self.ready.set()
        self.ready.set()

    def said(self) -> str:
        return "".join(self.log)


@contextmanager
def serve(*flags: str) -> Iterator[Server]:
    """A server until the block ends; it must leave in good order, having raised nothing."""
    command = [str(PYTHON), "-m", "api", *(x for pair in FLAGS.items() for x in pair), *flags]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in SETTINGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = Server(process)
    reader = threading.Thread(target=server.read, daemon=True)
    reader.start()
    try:
        server.ready.wait(240)
        assert server.port, f"the server did not become ready:\n{server.said()}"
        yield server
    finally:
        process.terminate()
        code = process.wait(120)
        reader.join(10)
    assert code == 0, f"the server ended with {code}:\n{server.said()}"
    assert "Traceback" not in server.said(), server.said()
