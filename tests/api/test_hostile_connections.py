"""A server process under clients that mean it no good, with few files that it may open.

They are idle, slow, half-open, greedy and many. Meanwhile /health and /metrics answer quickly,
running streams go on, and afterwards all file descriptors are free.
"""

import http.client
import random
import re
import resource
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.thorough import THOROUGH

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SOFT_FILES, HARD_FILES = 100, 200
CROWD = 300
"""More connections than the server may open files."""
UNDER_ATTACK_S = 2.0 * THOROUGH
QUICK_S = 0.1
"""Of the answers to /health, more than half come within this time, or within `AS_AT_REST` times
what they take without attacks if the machine is busy with something else.
"""
AS_AT_REST = 10
SLOWEST_S = 2.0
"""No answer takes longer, even on a machine that is busy with something else."""


class Target:
    """The server, and what the tests know about its process."""

    def __init__(self, process: "subprocess.Popen[str]", port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def connect(self, sent: bytes = b"") -> socket.socket:
        """Connect and send, or fail silently, as the server may close the connection any time."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        connection.setblocking(False)
        try_to_send(connection, sent)
        return connection

    def num_files(self) -> int:
        return psutil.Process(self.process.pid).num_fds()


@contextmanager
def target() -> Iterator[Target]:
    process = subprocess.Popen(
        [
            *("sh", "-c", f'ulimit -Sn {SOFT_FILES}; ulimit -Hn {HARD_FILES}; exec "$@"', "sh"),
            *(sys.executable, "-m", "tests.api.serve_scripted", "--hurried"),
            *("--hostname", "127.0.0.1", "--port", "0", "--no-log-colorize"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        ready = next(line for line in process.stdout if line.startswith("Ready on"))
        server = Target(process, int(re.findall(r"127\.0\.0\.1:(\d+)", ready)[0]))
        assert stream(server) == 20  # so that all that is opened once is open
        yield server
    finally:
        process.kill()
        process.communicate()


def try_to_send(connection: socket.socket, sent: bytes) -> None:
    with suppress(OSError):
        connection.send(sent)


def ends(connection: socket.socket) -> bool:
    """Tell whether the server has closed the connection."""
    try:
        while piece := connection.recv(1 << 16):
            assert piece
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def keep_a_crowd(server: Target, sent: bytes, stop: threading.Event) -> None:
    """Hold many connections on which `sent` was sent, and open new ones for those that end."""
    crowd: list[socket.socket] = []
    while not stop.wait(0.05):
        crowd = [connection for connection in crowd if not ends(connection)]
        crowd += [server.connect(sent) for _ in range(min(20, CROWD - len(crowd)))]
    for connection in crowd:
        connection.close()


def drip(server: Target, sent: bytes, stop: threading.Event) -> None:
    """Send a byte at a time on some connections."""
    crowd = [server.connect(sent) for _ in range(20)]
    while not stop.wait(0.1):
        for connection in crowd:
            try_to_send(connection, b"x")
    for connection in crowd:
        connection.close()


def come_and_go(server: Target, sent: bytes, stop: threading.Event) -> None:
    """Connect, send and leave, as fast as can be."""
    while not stop.wait(0.005):
        server.connect(sent).close()


HALF_A_HEAD = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-le"
HALF_A_BODY = (
    b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b'content-length: 1000\r\n\r\n{"inputs": "'
)
WHOLE = b"GET /info HTTP/1.1\r\nhost: x\r\n\r\n"
Attack = tuple[Callable[[Target, bytes, threading.Event], None], bytes]
ATTACKS: dict[str, list[Attack]] = {
    "idle": [(keep_a_crowd, b""), (keep_a_crowd, WHOLE)],
    "half a request": [(keep_a_crowd, HALF_A_HEAD), (keep_a_crowd, HALF_A_BODY)],
    "slow and fleeting": [(drip, HALF_A_HEAD), (drip, HALF_A_BODY), (come_and_go, HALF_A_BODY)],
}


@contextmanager
def under(attacks: list[Attack], server: Target) -> Iterator[None]:
    stop = threading.Event()
    threads = [
        threading.Thread(target=attack, args=(server, sent, stop)) for attack, sent in attacks
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def seconds_of(server: Target, path: str = "/health") -> float:
    """Return how long the answer took, on a connection of its own."""
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", path)
    assert connection.getresponse().status == 200
    connection.close()
    return time.perf_counter() - started


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def stream(server: Target) -> int:
    """Return the number of events of a stream of 20 tokens, which takes a second."""
    answer = httpx2.post(f"{server.url}/generate_stream", json={"inputs": "x"}, timeout=20)
    return answer.content.count(b"data: ")


def test_health_answers_quickly_whatever_others_do() -> None:
    with target() as server:
        at_rest = server.num_files()
        assert at_rest < SOFT_FILES
        undisturbed = statistics.median(seconds_of(server) for _ in range(20))
        for attacks in ATTACKS.values():
            took: list[float] = []
            with under(attacks, server), ThreadPoolExecutor(1) as beside:
                time.sleep(0.3)
                streamed = beside.submit(stream, server)
                until = time.monotonic() + UNDER_ATTACK_S
                while time.monotonic() < until or not took:
                    took += [seconds_of(server, path) for path in ("/health", "/metrics")]
                assert server.num_files() <= HARD_FILES
                assert streamed.result() == 20
            assert statistics.median(took) < max(QUICK_S, AS_AT_REST * undisturbed)
            assert max(took) < SLOWEST_S
        assert eventually(lambda: server.num_files() <= at_rest)
        server.process.terminate()
        log = server.process.communicate(timeout=10)[0]
    assert len(re.findall("connections are open", log)) == 1
    assert len(log.splitlines()) < 10


def test_more_connections_are_open_than_the_soft_limit_allows() -> None:
    with target() as server:
        held = [server.connect() for _ in range(SOFT_FILES + 10)]
        assert eventually(lambda: server.num_files() > SOFT_FILES)
        assert seconds_of(server) < SLOWEST_S
        assert not any(ends(connection) for connection in held)
        assert eventually(lambda: all(ends(connection) for connection in held))


def test_a_server_that_runs_out_of_files_still_answers() -> None:
    """Files that are no connections may use up all that the process can open."""
    with target() as server:
        held = [server.connect() for _ in range(60)]
        assert eventually(lambda: server.num_files() > 60)
        low = server.num_files() + 2
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (low, HARD_FILES))
        for _ in range(20):
            assert seconds_of(server) < SLOWEST_S
            held.append(server.connect())
        before = sum(psutil.Process(server.process.pid).cpu_times()[:2])
        time.sleep(0.5)
        assert sum(psutil.Process(server.process.pid).cpu_times()[:2]) - before < 0.3


def test_whatever_bytes_arrive_the_server_goes_on() -> None:
    noise = random.Random(1)
    whole = HALF_A_BODY + b"x" * 1000
    with target() as server:
        at_rest = server.num_files()
        for _ in range(200 * THOROUGH):
            sent = bytearray(whole[: noise.randrange(len(whole))])
            for _ in range(noise.randrange(4)):
                if sent:
                    sent[noise.randrange(len(sent))] = noise.randrange(256)
            connection = server.connect(bytes(sent))
            if noise.random() < 0.5:
                select.select([connection], [], [], 0.01)
            connection.close()
        assert seconds_of(server) < SLOWEST_S
        assert eventually(lambda: server.num_files() <= at_rest)
        assert stream(server) == 20
