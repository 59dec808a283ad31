"""Starting the server for a measurement: what is left behind, and what is said of a failure."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.gpu import cold_start, models
from tests.engine.driving import make_engine
from tests.engine.models import family

pytestmark = pytest.mark.slow


def test_phases_are_read_from_the_metrics() -> None:
    metrics = (
        "# TYPE skiff_cold_start_seconds gauge\n"
        'skiff_cold_start_seconds{phase="import"} 4.25\n'
        'skiff_cold_start_seconds{phase="warm-up"} 1e-05\n'
        "skiff_steps_total 7.0\n"
    )
    assert cold_start.parse_phases(metrics) == {"import": 4.25, "warm-up": 1e-05}


def test_unused_memory_is_read_from_the_server_s_own_words() -> None:
    engine = make_engine(family("llama"))
    assert cold_start.parse_unused("\n".join(engine.summary())) is None
    engine.info = replace(engine.info, unused_bytes=1 << 28)
    assert cold_start.parse_unused("\n".join(engine.summary())) == 0.25


def test_a_checkpoint_is_gone_after_it_was_used() -> None:
    model = models.build("tiny", torch.device("cpu"), torch.float32)
    with cold_start.checkpoint(model) as folder:
        names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not folder.parent.exists()


def test_without_room_for_the_checkpoint_none_is_written() -> None:
    with pytest.raises(cold_start.NoRoom, match="the checkpoint needs 1000002 GB"):
        cold_start._roomy_folder(10**15)


def test_a_server_that_ends_tells_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: there is no such model\n")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
    process.wait()
    with pytest.raises(RuntimeError, match="the server ended with 1: error: there is no such"):
        cold_start._Server(process, log).check(time.perf_counter() + 60)


def test_a_server_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(TimeoutError):
            cold_start._Server(process, tmp_path / "log").check(time.perf_counter() - 1)
    finally:
        process.kill()
        process.wait()
