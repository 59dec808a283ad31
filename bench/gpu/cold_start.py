"""Time a server from the start of its process to its first token and to its last CUDA graph.

The checkpoint has random weights of a real shape. It lies in memory, so that no disk is timed.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bench.gpu.models import hf_tokenizer

_ROOT = Path(__file__).parents[2]
_SHARD_BYTES = 5 << 30
"""The shard size of Llama-3.1-8B's own checkpoint."""
_POLL_S = 0.02
_QUIET_S = 3.0
"""When no graph was captured for this long, all are; the server itself does not say so."""
_STOP_S = 20.0


class NoRoom(Exception):
    """No folder has the space for the checkpoint."""


@dataclass(frozen=True, slots=True)
class Start:
    """When the milestones of a start were reached, in seconds since the process was started.

    first_token_s  a request, retried from the first moment, got its token
    prepared_s     the last graph was captured
    phases         seconds of each phase of the start, from `/metrics`
    unused_gib     what torch holds on a GPU beyond what is in use, from the server's first lines
    """

    first_token_s: float
    prepared_s: float
    phases: dict[str, float]
    unused_gib: float | None

    def figures(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def checkpoint(model: PreTrainedModel) -> Iterator[Path]:
    """Write the model and a tokenizer to a temporary folder, and yield it. Raises NoRoom."""
    with tempfile.TemporaryDirectory(dir=_roomy_folder(model.get_memory_footprint())) as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder, max_shard_size=_SHARD_BYTES)
        hf_tokenizer(model.config.vocab_size).save_pretrained(folder)
        del model  # the server needs the memory
        yield folder


def _roomy_folder(num_bytes: int) -> Path:
    """Return a folder with enough space, in memory if possible, so that no disk is read."""
    folders = [Path("/dev/shm"), Path(tempfile.gettempdir())]
    needed = num_bytes + (2 << 30)
    for folder in folders:
        if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > needed:
            return folder
    raise NoRoom(f"the checkpoint needs {needed / 1e9:.0f} GB: neither of {folders} has that")


def start(folder: Path, deadline: float) -> Start:
    """Start `python -m api`, time it, and stop it. `deadline` is a `time.perf_counter` time.

    Raises RuntimeError with the end of the log if the server ends, TimeoutError after `deadline`.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    started = time.perf_counter()
    with _server(folder, port) as server:
        url = f"http://127.0.0.1:{port}"
        _await_token(server, url, deadline)
        first_token_s = time.perf_counter() - started
        prepared, phases = _await_graphs(server, url, deadline)
        unused_gib = parse_unused(server.log.read_text(errors="replace"))
        return Start(first_token_s, max(prepared - started, first_token_s), phases, unused_gib)


@dataclass(frozen=True, slots=True)
class _Server:
    process: subprocess.Popen[bytes]
    log: Path

    def check(self, deadline: float) -> None:
        """Raise if the process has ended or the deadline has passed."""
        if self.process.poll() is not None:
            log_end = self.log.read_text(errors="replace").strip()[-400:]
            raise RuntimeError(f"the server ended with {self.process.returncode}: {log_end}")
        if time.perf_counter() > deadline:
            raise TimeoutError("the server did not start in time")


@contextmanager
def _server(folder: Path, port: int) -> Iterator[_Server]:
    command = [sys.executable, "-m", "api", "--model-id", str(folder)]
    command += ["--hostname", "127.0.0.1", "--port", str(port)]
    log = folder.parent / "log"
    # Kernels are kept for the next start of the same checkpoint, and none are there at the first.
    kernels = {"TRITON_CACHE_DIR": str(folder.parent / "kernels")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=os.environ | kernels | {"HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield _Server(process, log)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_token(server: _Server, url: str, deadline: float) -> None:
    body = json.dumps({"inputs": "the first", "parameters": {"max_new_tokens": 1}}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    while True:
        server.check(deadline)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                json.load(answer)
                return
        except ConnectionError:
            pass
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
        time.sleep(_POLL_S)


def _await_graphs(server: _Server, url: str, deadline: float) -> tuple[float, dict[str, float]]:
    """Return when the last graph was captured, and the phases of the start."""
    phases, changed = _phases(url), time.perf_counter()
    while time.perf_counter() - changed < _QUIET_S:
        server.check(deadline)
        now = _phases(url)
        if now != phases:
            phases, changed = now, time.perf_counter()
        time.sleep(5 * _POLL_S)  # each request takes time from the capture
    return changed, phases


def _phases(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=120) as answer:
        return parse_phases(answer.read().decode())


def parse_phases(metrics: str) -> dict[str, float]:
    """Return the seconds of each phase, from the text of `/metrics`."""
    found = re.findall(r'^skiff_cold_start_seconds\{phase="([^"]+)"\} (\S+)', metrics, re.MULTILINE)
    return {phase: float(seconds) for phase, seconds in found}


def parse_unused(log: str) -> float | None:
    """Return the GiB of unusable gaps between the weights that the server tells, None on a CPU."""
    found = re.search(r"([\d.]+) GiB of unusable gaps", log)
    return float(found[1]) if found else None
