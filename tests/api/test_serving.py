"""The life of the process: ready when it serves, drained when it is told to stop."""

import re
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from api.__main__ import main
from engine.errors import LoadError

SCRIPT = Path(__file__).parent / "serve_scripted.py"


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(SCRIPT), "--hostname", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(SCRIPT.parents[2])},
    )
    yield process
    process.kill()
    process.communicate()


def ready_line(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    assert server.stdout.readline() == "one limit: 1\n"
    return server.stdout.readline()


def test_it_says_when_it_is_ready_and_drains_on_sigterm(server: subprocess.Popen[str]) -> None:
    found = re.search(r"^Ready on .* curl (127\.0\.0\.1:\d+)/generate ", ready_line(server))
    assert found is not None
    url = f"http://{found[1]}/generate_stream"
    with httpx2.stream("POST", url, json={"inputs": "x"}) as answer:
        chunks = answer.iter_bytes()
        received = next(chunks)
        server.send_signal(signal.SIGTERM)
        received += b"".join(chunks)
    assert received.count(b"data: ") == 20
    assert server.wait(5) == 0


@pytest.fixture
def broken_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        @staticmethod
        def load(*_: object) -> None:
            raise LoadError("no such model; try another")

    module = types.ModuleType("engine.engine")
    module.Engine = Engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "engine.engine", module)


@pytest.mark.usefixtures("broken_engine")
def test_a_model_that_does_not_load_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", "0"]) == 1
    assert capsys.readouterr().err == "error: no such model; try another\n"


@pytest.mark.usefixtures("broken_engine")
def test_a_taken_port_is_told_before_the_model_loads(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--hostname", "127.0.0.1", "--port", str(port)]) == 1
    assert capsys.readouterr().err == f"error: --port (PORT): {port}: Address already in use\n"
