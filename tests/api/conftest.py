"""Fixtures for all tests of the HTTP server: a bare environment and a leak detector."""

from collections.abc import Iterator

import pytest

from api.settings.config import Settings
from tests.api.scripted import ScriptedEngine


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(autouse=True)
def _leak_detector() -> Iterator[None]:
    """Check after each test that every permit was given back and every generation closed."""
    ScriptedEngine.made.clear()
    yield
    for engine in ScriptedEngine.made:
        assert engine.num_permits == engine.max_permits
        assert engine.num_open == 0
