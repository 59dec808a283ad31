"""One server for the whole session, with the embedded model. The tests here import nothing of the
project, since they run in an environment without it.
"""

import os
from collections.abc import Iterator

import pytest

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "LANGSMITH_TRACING": "false"}

from clients.server import Server, serve


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate", action="store_true", help="rewrite clients/snapshots, to be reviewed"
    )


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with serve("--enable-prefill-logprobs") as running:
        yield running


@pytest.fixture(scope="session")
def url(server: Server) -> str:
    return server.url


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
