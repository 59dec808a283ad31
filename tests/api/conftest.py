"""What every test of the HTTP side gets: a bare environment and a leak detector."""

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
def _everything_given_back() -> Iterator[None]:
    """Whatever a test does, no permit and no generation outlives it."""
    ScriptedEngine.made.clear()
    yield
    for engine in ScriptedEngine.made:
        assert engine.num_permits == engine.max_permits
        assert engine.num_open == 0
