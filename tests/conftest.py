"""Fixtures of every test: the leak detector, and kernels that run without a GPU."""

from collections.abc import Iterator

import pytest

from tests import interpreter

interpreter.install()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if interpreter.INTERPRETED:
        terminalreporter.write_line("GPU suite skipped: no CUDA device. Kernels were interpreted.")


@pytest.fixture(autouse=True)
def leak_detector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Audit every scheduler that the test made: free + cached + used blocks are all blocks, no
    block is in use, and no sequence is left.
    """
    from engine.core.scheduler import Scheduler

    made: list[Scheduler] = []
    init = Scheduler.__init__

    def remember(self: Scheduler, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(Scheduler, "__init__", remember)
    yield
    for scheduler in made:
        scheduler.check_integrity()
        assert scheduler.sequences == []
        assert scheduler.pool.num_used == 0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
