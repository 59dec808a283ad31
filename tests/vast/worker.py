"""A worker process with a scripted engine that generates 20 tokens per second."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.vast.autoscaler import Autoscaler

ROOT = Path(__file__).parents[2]
NUM_TOKENS = 20
"""Tokens that each request generates and declares."""
SECONDS = 1.0
"""Duration of a request."""
PLATFORM = {"CONTAINER_ID": "42", "MASTER_TOKEN": "t", "PUBLIC_IPADDR": "127.0.0.1"}


@dataclass
class WorkerProcess:
    """A running worker and its output so far."""

    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def read_output(self) -> None:
        for line in self.process.stdout or ():
            self.log.append(line)

    def output(self) -> str:
        return "".join(self.log)


@contextmanager
def scripted_worker(
    autoscaler: Autoscaler, folder: Path, port: int, **variables: str
) -> Iterator[WorkerProcess]:
    """Run a worker and at the end terminate it as Vast does. It must have logged no exception."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.api.serve_scripted"],
        cwd=ROOT,
        env=worker_environment(autoscaler, folder, port) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    worker = WorkerProcess(process, port=port)
    reader = threading.Thread(target=worker.read_output, daemon=True)
    reader.start()
    try:
        yield worker
    finally:
        process.terminate()
        code = process.wait(30)
        reader.join(10)
    assert code == 0, worker.output()
    assert "Traceback" not in worker.output(), worker.output()


def worker_environment(autoscaler: Autoscaler, folder: Path, port: int) -> dict[str, str]:
    """Return the variables of a worker that reports to `autoscaler`."""
    return {
        **{name: value for name, value in os.environ.items() if not _is_setting(name)},
        **PLATFORM,
        "REPORT_ADDR": autoscaler.url,
        "VAST_CONSOLE_URL": autoscaler.listeners[0].url,
        "WORKER_PORT": str(port),
        f"VAST_TCP_PORT_{port}": str(port),
        "USE_SSL": "false",
        "TLS_DIRECTORY": str(folder),
        "BENCHMARK_CACHE": str(folder),
        "BENCHMARK_SECONDS": "0.5",
        "LOG_COLORIZE": "1",
    }


def _is_setting(name: str) -> bool:
    """Whether the variable is one of Vast's, in case the tests run on Vast."""
    return bool(re.fullmatch(r"CONTAINER_ID|VAST_.*|REPORT_ADDR|BACKEND|API_KEY|PORT", name))
