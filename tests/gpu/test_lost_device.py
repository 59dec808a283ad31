"""A server whose device fails or hangs for real: its streams get their error, and it comes back."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.api.faulty import FaultyServer, faulty_server
from tests.api.test_lost_engine import LOCAL, Clients, ask, last, port

SOON_S = 10.0


@contextmanager
def running(folder: Path, *flags: str) -> Iterator[FaultyServer]:
    flags = (*LOCAL, "--port", port(), *flags)
    with faulty_server(folder, *flags, engine="real", environment=os.environ) as server:
        server.await_ready()
        yield server


def failed(clients: Clients) -> list[dict[str, Any]]:
    return [last(stream)[1] for stream in clients.streams.values()]


@pytest.mark.parametrize("fault", ["illegal_address", "wrong_index"])
def test_a_fault_of_the_device_ends_the_process_and_the_next_one_serves(
    fault: str, tmp_path: Path
) -> None:
    with running(tmp_path) as server:
        url = server.await_ready()
        before = ask(url)
        clients = Clients(url, ("/generate_stream", "/v1/chat/completions"))
        server.obey(fault)
        server.wait(lambda: not server.told.exists(), SOON_S)
        struck = time.monotonic()
        assert all("error" in event for event in failed(clients))
        assert time.monotonic() - struck < SOON_S
        assert server.await_ready(2) == url
        assert "the server died (its engine died)" in server.said
        assert ask(url) == before


def test_a_kernel_that_does_not_end_is_left_behind(tmp_path: Path) -> None:
    with running(tmp_path, "--watchdog-timeout", "5") as server:
        url = server.await_ready()
        before = ask(url)
        clients = Clients(url, ("/generate_stream",))
        server.obey("endless_kernel")
        (event,) = failed(clients)
        assert "has hung" in event["error"]
        assert server.await_ready(2) == url
        assert ask(url) == before


def test_sigterm_ends_a_server_whose_kernel_does_not_end(tmp_path: Path) -> None:
    with running(tmp_path, "--graceful-termination-timeout", "3") as server:
        clients = Clients(server.await_ready(), ("/generate_stream",))
        server.obey("endless_kernel")
        server.wait(lambda: not server.told.exists(), SOON_S)
        asked = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        (event,) = failed(clients)
        assert "the server is shutting down" in event["error"]
        assert server.end(60) == 0
        assert time.monotonic() - asked < 3 + SOON_S
