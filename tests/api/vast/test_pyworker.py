"""The log file that Vast's stock PyWorker reads."""

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from api.settings.config import ConfigError
from api.telemetry.logs import configure_logging, connected
from api.vast import pyworker

LOADED = (
    '"message":"Connected","target":"text_generation_router"',
    '"message":"Connected","target":"text_generation_router::server"',
)
"""The stock worker searches each line for one of these."""


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    yield
    configure_logging(False, "info", False)


def test_the_line_that_the_stock_worker_waits_for_is_appended_to_the_byte(tmp_path: Path) -> None:
    log = tmp_path / "workspace" / "infer.log"
    configure_logging(True, "info", False, pyworker.log_file(log))
    connected()
    assert any(words in log.read_text() for words in LOADED)


def test_a_truncated_log_continues_at_its_new_end(tmp_path: Path) -> None:
    log = tmp_path / "infer.log"
    log.write_text("earlier\n")
    configure_logging(True, "info", False, pyworker.log_file(log))
    connected()
    assert log.read_text().startswith("earlier\n")
    log.write_text("")
    connected()
    assert log.read_bytes().startswith(b'{"timestamp"')
    assert log.read_text().count("\n") == 1


def test_each_line_is_logged_once_if_standard_output_is_the_log_file(tmp_path: Path) -> None:
    log = tmp_path / "infer.log"
    program = (
        "from pathlib import Path; import sys; from api.vast import pyworker;"
        "from api.telemetry import logs;"
        "logs.configure_logging(True, 'info', False, pyworker.log_file(Path(sys.argv[1])));"
        "logs.connected()"
    )
    with log.open("a") as out:
        subprocess.run([sys.executable, "-c", program, str(log)], stdout=out, check=True)
    assert log.read_text().count("Connected") == 1


@pytest.mark.anyio
async def test_connected_is_repeated_until_the_first_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(pyworker, "_REPEAT_S", 0.01)
    figures = SimpleNamespace(num_steps=4)
    engine: Any = SimpleNamespace(status=lambda: SimpleNamespace(figures=figures))
    repeating = asyncio.create_task(pyworker.repeat_connected(engine))
    while sum(record.message == "Connected" for record in caplog.records) < 3:
        await asyncio.sleep(0.005)
    figures.num_steps += 1
    await asyncio.wait_for(repeating, 1)


def test_a_log_that_cannot_be_written_is_refused_by_the_name_of_its_setting(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    for path, why in (
        (tmp_path / "file" / "infer.log", "File exists"),
        (tmp_path, "Is a directory"),
        (Path("/proc/none/infer.log"), "No such file or directory"),
    ):
        with pytest.raises(ConfigError) as caught:
            pyworker.log_file(path)
        assert str(caught.value) == f"--model-log (MODEL_LOG) {path}: {why}"
