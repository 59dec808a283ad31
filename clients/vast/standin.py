"""The stand-in for Vast's autoscaler (`tests/vast/autoscaler.py`) as a separate process."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from clients.server import PYTHON, Server, started

ENDPOINT = "skiff"
"""The stand-in's only endpoint."""


@dataclass
class StandIn:
    """A running stand-in, controlled over HTTP."""

    process: Server
    url: str
    in_sessions: float = 0.0
    """Workload of requests inside sessions so far. Tests that make such requests add to it."""
    unused: float = 0.0
    """Workload of tokens that were not generated although the request succeeded."""

    def ledger(self) -> dict[str, Any]:
        return self._get("/_ledger")

    def reports(self) -> list[dict[str, Any]]:
        return [report["body"] for report in self.ledger()["reports"]]

    def deletions_of(self, request_idx: int) -> list[dict[str, Any]]:
        return [x for x in self.ledger()["deletions"] if x["request_idx"] == request_idx]

    def control(self, name: str, **arguments: Any) -> None:
        httpx2.post(f"{self.url}/_control/{name}", json=arguments).raise_for_status()

    def envelope(self, payload: dict[str, Any]) -> dict[str, Any]:
        return httpx2.post(f"{self.url}/_envelope", json=payload).raise_for_status().json()

    def settled(self, timeout_s: float = 25.0) -> list[str]:
        """Give the worker time to report (its reports may be 10 s apart), and return the complaints
        that remain.
        """
        deadline = time.monotonic() + timeout_s
        while (complaints := self._complaints()) and time.monotonic() < deadline:
            time.sleep(0.3)
        return complaints

    def wait_until_ready(self, worker: Server, timeout_s: float = 240.0) -> None:
        """Wait until clients are routed to the worker. Fails if its process ends before."""
        self._wait(lambda: self._statuses() == ["ready"], worker, timeout_s)

    def _wait(self, condition: Callable[[], bool], worker: Server, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            alive = worker.process.poll() is None and time.monotonic() < deadline
            assert alive, f"no worker is ready: {self.process.output()}\n{worker.output()}"
            time.sleep(0.3)

    def _statuses(self) -> list[str]:
        return [worker["status"] for worker in self.ledger()["workers"]]

    def _complaints(self) -> list[str]:
        return self._get(f"/_complaints?in_sessions={self.in_sessions}&unused={self.unused}")

    def _get(self, path: str) -> Any:
        return httpx2.get(f"{self.url}{path}").raise_for_status().json()


@contextmanager
def stand_in() -> Iterator[StandIn]:
    with started([str(PYTHON), "-m", "tests.vast.autoscaler", "--port", "0"]) as process:
        deadline = time.monotonic() + 30
        while not process.log:
            assert time.monotonic() < deadline, "the stand-in does not start"
            time.sleep(0.05)
        yield StandIn(process, process.log[0].removeprefix("Autoscaler on ").strip())
    process.check_clean_exit()
