"""A worker in a process of its own, around an engine that is scripted: 20 tokens a second."""

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
"""Of each request; what it declares, too."""
SECONDS = 1.0
"""That a request takes."""
PLATFORM = {"CONTAINER_ID": "42", "MASTER_TOKEN": "t", "PUBLIC_IPADDR": "127.0.0.1"}


@dataclass
class WorkerProcess:
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def read(self) -> None:
        for line in self.process.stdout or ():
            self.log.append(line)

    def said(self) -> str:
        return "".join(self.log)


@contextmanager
def scripted_worker(
    autoscaler: Autoscaler, folder: Path, port: int, **variables: str
) -> Iterator[WorkerProcess]:
    """It ends as the platform ends it, and must have raised nothing."""
    environment = {
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
        **variables,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.api.serve_scripted"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    worker = WorkerProcess(process, port=port)
    reader = threading.Thread(target=worker.read, daemon=True)
    reader.start()
    try:
        yield worker
    finally:
        process.terminate()
        code = process.wait(30)
        reader.join(10)
    assert code == 0, worker.said()
    assert "Traceback" not in worker.said(), worker.said()


def _is_setting(name: str) -> bool:
    """Of this machine's own, should it be one of the platform's."""
    return bool(re.fullmatch(r"CONTAINER_ID|VAST_.*|REPORT_ADDR|BACKEND|API_KEY|PORT", name))
