"""The supervisor and servers that do nothing but end: what is started again, and what is not."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from api.__main__ import is_supervised
from api.handover import Handover
from api.settings.config import read_settings
from api.supervisor import LOST

ROOT = Path(__file__).parents[2]
PROGRAM = """
import ctypes, os, signal, sys, time
from api import supervisor

supervisor._PAUSE_S = {pause}
supervisor._STEADY_S = {steady}

def say(*words):
    print(*words, flush=True)

def serve(handover):
    start = int(handover.books or b"0") + 1
    handover.write_books(str(start).encode())
    say("start", start)
{serve}

def report(reason):
    say("reported:", reason)
    return 1

{first}
sys.exit(supervisor.supervise(serve, report))
"""
READY = "handover.mark_ready()"
FOREVER = "time.sleep(60)"

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a supervisor of a server that consists of these statements."""
    started = []

    def start(
        *statements: str,
        first: str = "",
        wrapper: tuple[str, ...] = (),
        pause: float = 0.01,
        steady: float = 600.0,
        **options: Any,
    ) -> subprocess.Popen[str]:
        serve = "\n".join(f"    {statement}" for statement in statements)
        program = PROGRAM.format(serve=serve, first=first, pause=pause, steady=steady)
        process = subprocess.Popen(
            [*wrapper, sys.executable, "-c", program],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit status and all that was printed."""
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def await_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for said in process.stdout:
        if said == line + "\n":
            return
    raise AssertionError(f"ended without saying {line}")


def state_of(pid: int) -> str:
    """Return the letter of the process's state, or `gone`."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def await_end(pid: int) -> None:
    deadline = time.monotonic() + 20
    while state_of(pid) not in ("gone", "Z"):
        assert time.monotonic() < deadline, "it is still alive"
        time.sleep(0.02)


@pytest.mark.parametrize("status", [0, 1, 2, 3, 87])
def test_a_server_that_ends_by_itself_is_not_started_again(start: Start, status: int) -> None:
    assert ended(start(READY, f"return {status}")) == (status, "start 1\n")


@pytest.mark.parametrize("how", ["sys.exit({})", "raise SystemExit({})"])
def test_a_server_that_exits_gives_its_status_on(start: Start, how: str) -> None:
    assert ended(start(how.format(4))) == (4, "start 1\n")


def test_an_exception_is_shown_and_is_no_reason_to_start_again(start: Start) -> None:
    status, said = ended(start(READY, "raise ValueError('no')"))
    assert status == 1
    assert said.startswith("start 1\nTraceback")
    assert said.endswith("ValueError: no\n")


@pytest.mark.parametrize("is_ready", [True, False])
def test_a_server_that_lost_its_engine_is_started_again(start: Start, is_ready: bool) -> None:
    first = f"if start < 3: return {LOST}"
    status, said = ended(start(READY if is_ready else "pass", first, "return 5"))
    assert status == 5
    assert [line for line in said.splitlines() if line.startswith("start ")] == [
        "start 1",
        "start 2",
        "start 3",
    ]
    assert "supervisor: the server died (its engine died): starting it again in 0.01 s" in said


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGBUS])
def test_a_server_that_dies_of_a_signal_when_it_is_ready_is_started_again(
    start: Start, number: signal.Signals
) -> None:
    die = f"if start == 1: os.kill(os.getpid(), {number:d}); {FOREVER}"
    status, said = ended(start(READY, die, "return 0"))
    assert status == 0
    assert f"signal {number:d} (" in said
    assert said.endswith("start 2\n")


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_one_that_dies_of_a_signal_while_it_starts_is_reported_instead(
    start: Start, number: signal.Signals
) -> None:
    status, said = ended(start(f"os.kill(os.getpid(), {number:d})", FOREVER))
    assert status == 128 + number
    assert "start 2" not in said
    assert f"reported: the server died (signal {number:d}" in said


def test_after_five_restarts_in_a_row_the_failure_is_reported(start: Start) -> None:
    status, said = ended(start(READY, f"return {LOST}"))
    assert status == LOST
    assert "start 6" in said
    assert "start 7" not in said
    assert said.count("reported: the server died (its engine died)") == 1


def test_servers_that_were_ready_for_long_are_started_again_without_end(start: Start) -> None:
    stay = f"if start < 12: time.sleep(0.02); return {LOST}"
    status, said = ended(start(READY, stay, "return 0", steady=0.01))
    assert status == 0
    assert "start 12" in said


def test_each_restart_in_a_row_waits_twice_as_long(start: Start) -> None:
    _, said = ended(start(READY, f"return {LOST}"))
    assert [f"again in {0.01 * 2**n:g} s" in said for n in range(6)] == [True] * 5 + [False]


HANDLER = "signal.signal(signal.SIG{0}, lambda *_: (say('got {0}'), sys.exit({1})))"


@pytest.mark.parametrize(
    ("name", "status"), [("TERM", 0), ("INT", 0), ("HUP", 7), ("USR1", 8), ("QUIT", 9)]
)
def test_signals_are_passed_on(start: Start, name: str, status: int) -> None:
    server = start(READY, HANDLER.format(name, status), "say('ready')", FOREVER)
    await_line(server, "ready")
    server.send_signal(getattr(signal, f"SIG{name}"))
    assert ended(server) == (status, f"got {name}\n")


@pytest.mark.slow
def test_a_terminal_s_interrupt_comes_once(start: Start) -> None:
    """The second would end the server at once."""
    count = "signal.signal(signal.SIGINT, lambda *_: say('got INT'))"
    server = start(READY, count, "say('ready')", "time.sleep(1); time.sleep(1)", "return 0")
    await_line(server, "ready")
    os.killpg(server.pid, signal.SIGINT)
    assert ended(server) == (0, "got INT\n")


@pytest.mark.parametrize("status", [LOST, 0])
def test_a_server_that_was_told_to_end_is_not_started_again(start: Start, status: int) -> None:
    server = start(READY, HANDLER.format("TERM", status), "say('ready')", FOREVER)
    await_line(server, "ready")
    server.terminate()
    assert ended(server) == (status, "got TERM\n")


@pytest.mark.slow
def test_a_server_that_does_not_end_when_told_is_killed(start: Start) -> None:
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    server = start("handover.termination_s = 0.5", ignore, READY, "say('ready')", FOREVER)
    await_line(server, "ready")
    asked = time.monotonic()
    server.terminate()
    status, said = ended(server)
    assert status == 128 + signal.SIGKILL
    assert time.monotonic() - asked >= 0.5
    assert said == "supervisor: the server does not end: it is killed\n"


def test_a_signal_during_the_pause_ends_the_supervisor(start: Start) -> None:
    server = start(READY, f"return {LOST}", pause=60.0)
    assert server.stdout is not None
    assert server.stdout.readline() == "start 1\n"
    assert "starting it again in 60 s" in server.stdout.readline()
    server.terminate()
    assert ended(server) == (0, "")


def test_the_server_dies_with_its_supervisor(start: Start) -> None:
    server = start(READY, "signal.signal(15, signal.SIG_IGN)", "say(os.getpid())", FOREVER)
    assert server.stdout is not None
    assert server.stdout.readline() == "start 1\n"
    child = int(server.stdout.readline())
    assert state_of(child) != "gone"
    server.kill()
    await_end(child)


def test_the_status_of_orphans_is_taken(start: Start) -> None:
    """They come to the first process of a container; here the supervisor asks for them."""
    adopt = "ctypes.CDLL(None).prctl(36, 1)"  # PR_SET_CHILD_SUBREAPER
    orphan = "if os.fork() == 0: pid = os.fork(); say(pid) if pid else time.sleep(0.2); os._exit(0)"
    server = start(READY, orphan, "os.wait()", FOREVER, first=adopt)
    assert server.stdout is not None
    assert server.stdout.readline() == "start 1\n"
    pid = int(server.stdout.readline())
    deadline = time.monotonic() + 20
    while state_of(pid) != "gone":
        assert time.monotonic() < deadline, "an orphan stays a zombie"
        time.sleep(0.02)
    server.terminate()
    assert ended(server)[0] == 0


NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child")
HAS_NAMESPACES = (
    shutil.which("unshare")
    and not subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode
)


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no rights to make a PID namespace")
@pytest.mark.parametrize(("serve", "status"), [(HANDLER.format("TERM", 0), 0), ("pass", 0)])
def test_the_first_process_of_a_container_passes_signals_on(
    start: Start, serve: str, status: int
) -> None:
    """The system keeps from the first process every signal that it does not handle."""
    server = start(READY, serve, "say('ready', os.getppid())", FOREVER, wrapper=NAMESPACE)
    await_line(server, "ready 1")
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
    os.kill(int(children.read_text()), signal.SIGTERM)
    assert ended(server)[0] == status


def test_children_leave_a_status_where_they_would_be_ignored(start: Start) -> None:
    server = start(
        f"return {LOST} if start == 1 else 6",
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    )
    assert ended(server)[0] == 6


def test_standard_input_is_the_server_s(start: Start) -> None:
    server = start("say(sys.stdin.readline().strip()); return 0", stdin=subprocess.PIPE)
    assert server.stdin is not None
    server.stdin.write("hello\n")
    assert ended(server) == (0, "start 1\nhello\n")


def test_the_supervisor_imports_nothing_large() -> None:
    program = "import sys; import api.__main__; print(*sys.modules)"
    said = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.split()
    ours = {name for name in said if name.partition(".")[0] in ("api", "engine", "kernels")}
    assert ours == {"api", "api.__main__", "api.handover", "api.supervisor"}
    large = {"asyncio", "fastapi", "logging", "numpy", "psutil", "pydantic", "torch", "uvicorn"}
    assert not large & set(said)


class TestHandover:
    def test_the_last_books_are_read(self) -> None:
        handover = Handover()
        assert handover.books == b""
        for books in (b"a" * 1000, b"", b"b", b"c" * 70_000):
            handover.write_books(books)
            assert handover.books == books

    def test_another_process_reads_them(self) -> None:
        handover = Handover()
        child = os.fork()
        if child == 0:
            handover.write_books(b"from the child")
            handover.termination_s = 3.5
            os._exit(0)
        os.waitpid(child, 0)
        assert handover.books == b"from the child"
        assert handover.termination_s == 3.5

    def test_books_outlive_a_server_that_dies_while_it_writes(self) -> None:
        handover = Handover()
        handover.write_books(b"whole")
        for _ in range(20):
            before = handover.books
            child = os.fork()
            if child == 0:
                while True:
                    handover.write_books(b"%d" % os.getpid() * 100_000)
            time.sleep(0.003)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert handover.books in (before, b"%d" % child * 100_000)

    def test_a_new_server_is_not_ready_and_finds_the_books(self) -> None:
        handover = Handover()
        handover.write_books(b"x")
        handover.mark_ready()
        assert 0 < handover.ready_since <= time.monotonic()
        handover.begin()
        assert handover.ready_since == 0
        assert handover.books == b"x"

    def test_books_that_are_too_long_change_nothing(self) -> None:
        handover = Handover()
        handover.write_books(b"x")
        with pytest.raises(ValueError, match="too long"):
            handover.write_books(bytes(1 << 24))
        assert handover.books == b"x"


@pytest.mark.parametrize("name", ["SUPERVISE", "supervise", "Supervise"])
@pytest.mark.parametrize(
    "value", ["", "0", "1", "f", "t", "false", "False", "TRUE", "n", "no", "NO", "off", "on", "yes"]
)
def test_the_variable_is_read_as_by_the_settings(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert is_supervised([], {name: value}) is read_settings([]).supervise


@pytest.mark.parametrize("flags", [[], ["--no-supervise"], ["--port", "1", "--no-supervise"]])
def test_the_flag_is_read_as_by_the_settings(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variables in ({}, {"SUPERVISE": "true"}, {"SUPERVISE": "false"}):
        monkeypatch.setenv("SUPERVISE", variables.get("SUPERVISE", ""))
        assert is_supervised(flags, variables) is read_settings(flags).supervise
