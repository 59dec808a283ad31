"""Vast's stock worker, unchanged, in front of Skiff, as in templates that use it."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from clients.vast.standin import StandIn, stand_in
from clients.vast.stock_worker import LOG_ACTIONS
from clients.vast.workers import Worker, model_behind_stock, model_by_its_output, stock_worker
from clients.wire import PROMPT, events

LOAD_LINE = '"message":"Connected","target":"text_generation_router'
HEALTHY_S = 25
"""Long enough for two health checks and two idle reports of Vast's worker."""


def model(kind: str, vast: StandIn, folder: Path) -> AbstractContextManager[int]:
    log = folder / "infer.log"
    return (
        model_by_its_output(log)
        if kind == "by its output"
        else model_behind_stock(vast, folder, log)
    )


@pytest.fixture(scope="module", params=["by its output", "by itself"])
def worker(request: Any, tmp_path_factory: Any) -> Iterator[Worker]:
    """A stock worker. Its log gets the ready line from Skiff's output, or from Skiff directly."""
    folder: Path = tmp_path_factory.mktemp("stock")
    with stand_in() as vast, model(request.param, vast, folder) as port:
        wait_for_load_line(folder / "infer.log")
        assert vast.reports() == []  # the model server itself reports nothing
        with stock_worker(vast, folder, port, folder / "infer.log") as running:
            yield running


def wait_for_load_line(log: Path, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not log.is_file() or LOAD_LINE not in log.read_text():
        assert time.monotonic() < deadline, log.read_text() if log.is_file() else "no log"
        time.sleep(0.2)


def post(worker: Worker, route: str, max_new_tokens: int) -> httpx2.Response:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": max_new_tokens}}
    return httpx2.post(f"{worker.url}{route}", json=worker.stand_in.envelope(body), timeout=60)


def test_the_stock_worker_measures_the_whole_generation(worker: Worker) -> None:
    """The stock worker's measurement ends when the headers arrive. If Skiff sent them before the
    text was complete, a laptop would seem a hundred times as fast as it is.
    """
    measured = worker.stand_in.reports()[-1]["max_perf"]
    began = time.monotonic()
    assert post(worker, "/generate", 64).status_code == 200
    alone = 64 / (time.monotonic() - began)
    assert 0 < measured < 20 * alone


def test_both_routes_are_proxied(worker: Worker) -> None:
    text = post(worker, "/generate", 8).json()["generated_text"]
    streamed = post(worker, "/generate_stream", 8)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    tokens = events(streamed.text)
    assert len(tokens) == 8
    assert "Paris" in text
    assert tokens[-1]["generated_text"] == text
    assert worker.stand_in.settled() == []


def test_the_stock_worker_stays_healthy(worker: Worker) -> None:
    time.sleep(HEALTHY_S)
    assert {report["error_msg"] for report in worker.stand_in.reports()} == {""}
    assert "Healthcheck successful" in worker.process.output()


def test_the_stock_worker_takes_no_log_line_for_an_error(worker: Worker) -> None:
    assert "Got log line indicating error" not in worker.process.output()
    assert LOG_ACTIONS.on_load[0] == LOAD_LINE + '"'


def test_the_ready_line_is_repeated_after_the_log_was_truncated(tmp_path: Path) -> None:
    """Vast's start script empties the log when it starts the worker, which may be late."""
    log = tmp_path / "infer.log"
    with stand_in() as vast, model_behind_stock(vast, tmp_path, log) as port:
        wait_for_load_line(log)
        log.write_text("")
        with stock_worker(vast, tmp_path, port, log):
            assert b"\0" not in log.read_bytes()
