import socket
from collections.abc import Iterator

import pytest

from tests.vast.autoscaler import Autoscaler, running


@pytest.fixture
def autoscaler() -> Iterator[Autoscaler]:
    with running() as listening:
        yield listening


@pytest.fixture
def port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
