"""Fixtures: the client of Vast's users, and the workers that it is routed to."""

import logging
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from vastai import Serverless

from clients.vast.standin import ENDPOINT, StandIn, stand_in
from clients.vast.workers import Worker, model_by_its_output, skiff_worker, stock_worker

logging.getLogger("vastai").setLevel(logging.WARNING)


WORKERS = ["skiff", "stock"] if "THOROUGH" in os.environ else ["skiff"]


@pytest.fixture(scope="module", params=WORKERS)
def worker(request: Any, tmp_path_factory: Any) -> Iterator[Worker]:
    """Skiff as a worker, over TLS. With THOROUGH set, also Vast's stock worker in front of Skiff,
    for which the tests must have the same results.
    """
    folder: Path = tmp_path_factory.mktemp(request.param)
    with stand_in() as vast:
        if request.param == "skiff":
            with skiff_worker(vast, folder) as running:
                yield running
        else:
            log = folder / "infer.log"
            with model_by_its_output(log) as port, stock_worker(vast, folder, port, log) as running:
                yield running


skiff_only = pytest.mark.parametrize("worker", ["skiff"], indirect=True)
"""Marks a test of something that Vast's stock worker does not do."""


@pytest.fixture
def vast(worker: Worker) -> Iterator[StandIn]:
    """The stand-in for the autoscaler, whose ledger must add up after each test."""
    yield worker.stand_in
    assert worker.stand_in.settled() == []


@pytest.fixture
async def endpoint(vast: StandIn) -> AsyncIterator[Any]:
    client = Serverless(api_key="account-key", autoscaler_url=vast.url, webserver_url=vast.url)
    client.SSL_CERT_URL = f"{vast.url}/static/jvastai_root.cer"
    async with client:
        yield await client.get_endpoint(ENDPOINT)
