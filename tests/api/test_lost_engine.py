"""A server whose engine dies or hangs: what its clients get, how it ends, and how it comes back."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from api.supervisor import LOST
from tests.api.faulty import ROOT, FaultyServer, faulty_server

pytestmark = pytest.mark.slow

LOCAL = ("--hostname", "127.0.0.1")
WHY = "CUDA error: an illegal memory access was encountered"
SOON_S = 6.0
"""Bound of what takes less than a second where nothing else runs."""
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 1500,
}
ENDLESS: dict[str, dict[str, Any]] = {
    "/generate_stream": {"inputs": "x", "parameters": {"max_new_tokens": 1500}},
    "/v1/chat/completions": CHAT | {"stream": True},
    "/v1/completions": {"model": "m", "prompt": "x", "max_tokens": 1500, "stream": True},
    "/v1/messages": CHAT | {"stream": True},
    "/v1/responses": {"model": "m", "input": "x", "max_output_tokens": 1500, "stream": True},
}


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextmanager
def running(folder: Path, *flags: str, **options: Any) -> Iterator[FaultyServer]:
    with faulty_server(folder, *LOCAL, "--port", port(), *flags, **options) as server:
        server.await_ready()
        yield server


class Clients:
    """Clients that stream, and clients that wait for a whole answer."""

    def __init__(self, url: str, paths: tuple[str, ...] = tuple(ENDLESS)) -> None:
        self._url = url
        self._paths = paths
        self._begun = dict.fromkeys(paths, False)
        self._threads = ThreadPoolExecutor(2 * len(paths))
        self.streams = {path: self._threads.submit(self._stream, path) for path in paths}
        self.answers = {path: self._threads.submit(self._ask, path) for path in paths}
        deadline = time.monotonic() + 60
        while not all(self._begun.values()):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _stream(self, path: str) -> tuple[float, list[Any]]:
        events = []
        with httpx2.stream("POST", self._url + path, json=ENDLESS[path], timeout=120) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    events.append(json.loads(line.removeprefix("data: ")))
                    self._begun[path] = True
        return time.monotonic(), events

    def _ask(self, path: str) -> tuple[float, httpx2.Response]:
        body = ENDLESS[path] if path == "/generate_stream" else ENDLESS[path] | {"stream": False}
        plain = path.removesuffix("_stream")
        answer = httpx2.post(self._url + plain, json=body, timeout=120)
        return time.monotonic(), answer


def last(future: Future[tuple[float, Any]]) -> tuple[float, Any]:
    at, events = future.result(120)
    return at, events[-1]


def ask(url: str) -> str:
    body = {"inputs": "x", "parameters": {"max_new_tokens": 3}}
    answer = httpx2.post(f"{url}/generate", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["generated_text"])


def test_every_client_gets_its_dialect_s_error_at_once_and_the_next_server_serves(
    tmp_path: Path,
) -> None:
    with running(tmp_path) as server:
        url = server.await_ready()
        clients = Clients(url)
        server.obey("die")
        server.wait(lambda: not server.told.exists(), 10)
        died = time.monotonic()
        tgi = {
            "error": f"Request failed during generation: {WHY}",
            "error_type": "generation",
        }
        got = {path: last(stream) for path, stream in clients.streams.items()}
        assert max(at for at, _ in got.values()) - died < SOON_S
        assert got["/generate_stream"][1] == tgi
        assert WHY in json.dumps(got["/v1/chat/completions"][1]["error"])
        assert WHY in json.dumps(got["/v1/completions"][1]["error"])
        assert got["/v1/messages"][1]["type"] == "error"
        assert got["/v1/responses"][1]["type"] in ("error", "response.failed")
        for path, future in clients.answers.items():
            _, answer = future.result(60)
            assert answer.status_code == (424 if path == "/generate_stream" else 500)
            assert WHY in answer.text
        assert server.await_ready(2) == url
        assert ask(url) == "aaa"
        assert "the server died (its engine died): starting it again in 0.5 s" in server.said
        health = [sys.executable, "-I", str(ROOT / "healthcheck.py")]
        environment = {"PORT": url.rpartition(":")[2], "WORKER_PORT": "1"}
        assert subprocess.run(health, env=environment, timeout=60).returncode == 0
        server.process.terminate()
        assert server.end() == 0


def test_without_a_supervisor_the_process_ends_with_a_status_of_its_own(tmp_path: Path) -> None:
    with running(tmp_path, "--no-supervise") as server:
        assert server.children() == []
        clients = Clients(server.await_ready(), ("/generate_stream",))
        server.obey("die")
        assert WHY in last(clients.streams["/generate_stream"])[1]["error"]
        assert server.end() == LOST
        assert "supervisor: " not in server.said


def test_a_step_that_hangs_fails_all_requests_and_is_left_behind(tmp_path: Path) -> None:
    with running(tmp_path, "--watchdog-timeout", "1") as server:
        url = server.await_ready()
        clients = Clients(url, ("/generate_stream", "/v1/chat/completions"))
        server.obey("hang")
        for stream in clients.streams.values():
            assert "has hung for 1 s" in json.dumps(last(stream)[1])
        _, answer = clients.answers["/generate_stream"].result(60)
        assert answer.status_code == 424
        assert server.await_ready(2) == url
        assert ask(url) == "aaa"
        assert "a step hangs; the engine thread is here:" in server.said
        assert "before_step" in server.said


@pytest.mark.parametrize("flags", [(), ("--no-supervise",)])
def test_sigterm_ends_a_server_whose_step_hangs_within_its_time(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    with running(tmp_path, "--graceful-termination-timeout", "2", *flags) as server:
        clients = Clients(server.await_ready(), ("/generate_stream",))
        server.obey("hang")
        server.wait(lambda: not server.told.exists(), 10)
        asked = time.monotonic()
        server.process.terminate()
        assert (
            "the server is shutting down" in last(clients.streams["/generate_stream"])[1]["error"]
        )
        assert server.end() == 0
        assert time.monotonic() - asked < 2 + SOON_S


def test_sigterm_ends_a_server_whose_step_lets_nothing_else_run(tmp_path: Path) -> None:
    with running(tmp_path, "--graceful-termination-timeout", "1") as server, ExitStack() as ending:
        url = server.await_ready() + "/generate_stream"
        stream = httpx2.stream("POST", url, json=ENDLESS["/generate_stream"], timeout=60)
        chunks = ending.enter_context(stream).iter_bytes()
        next(chunks)
        server.obey("lock")
        server.wait(lambda: not server.told.exists(), 10)
        asked = time.monotonic()
        server.process.terminate()
        assert server.end() == 128 + signal.SIGKILL
        assert time.monotonic() - asked < 2.5 + SOON_S
        assert "the server does not end: it is killed" in server.said


@pytest.mark.parametrize("fault", ["crash", "kill"])
def test_a_server_that_dies_of_a_signal_comes_back(fault: str, tmp_path: Path) -> None:
    with running(tmp_path) as server:
        url = server.await_ready()
        server.obey(fault)
        with pytest.raises(httpx2.TransportError):
            ask(url)
        assert server.await_ready(2) == url
        assert ask(url) == "aaa"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--max-batch-size", "0"), "Error: ArgumentValidation"),
        (("--no-such-flag",), "unrecognized arguments: --no-such-flag"),
        (("--model-id", "/no/such/folder"), "/no/such/folder"),
        (("--port", "taken"), "Address already in use"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_server_that_cannot_start_is_not_started_again(flags: tuple[str, ...], said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = tuple(str(taken.getsockname()[1]) if flag == "taken" else flag for flag in flags)
        ended = subprocess.run(
            [sys.executable, "-m", "api", *LOCAL, "--port", "0", *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ended.returncode in (1, 2)
    assert ended.stderr.count(said) == 1
    assert "supervisor: " not in ended.stderr


def test_help_names_the_flag_and_ends_with_0() -> None:
    command = [sys.executable, "-m", "api", "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0
    assert "--no-supervise" in ended.stdout


def test_the_supervisor_is_small(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        (child,) = server.children()
        own, served = (psutil.Process(pid).memory_info() for pid in (server.process.pid, child))
        assert own.rss < 32 << 20 < served.rss


@pytest.mark.thorough
def test_the_real_engine_dies_and_hangs_and_is_served_again(tmp_path: Path) -> None:
    flags = ("--watchdog-timeout", "20", "--graceful-termination-timeout", "2")
    with running(tmp_path, *flags, engine="real") as server:
        url = server.await_ready()
        before = ask(url)
        for times, fault, why in ((2, "die", WHY), (3, "hang", "has hung")):
            clients = Clients(url, ("/generate_stream",))
            server.obey(fault)
            assert why in last(clients.streams["/generate_stream"])[1]["error"]
            assert server.await_ready(times) == url
            assert ask(url) == before
        server.process.terminate()
        assert server.end() == 0
