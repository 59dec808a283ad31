"""A GPU's kernels are compiled by another process, and only what it can compile is asked for."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaConfig

from engine.core.config import EngineConfig, LoadConfig
from engine.loading import compile_ahead as module
from engine.loading.compile_ahead import compile_ahead, start_command

MODEL = LoadConfig("org/model")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that a machine with an H100 starts."""
    commands: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(module, "start_command", commands.append)
    return commands


def folder_with(tmp_path: Path, **options: Any) -> Path:
    LlamaConfig(**options).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("config", "stored", "dtype"),
    [
        (MODEL, "bfloat16", "bfloat16"),
        (MODEL, "float16", "float16"),
        (MODEL, "float32", "bfloat16"),
        (LoadConfig("org/model", dtype="float32"), "bfloat16", "float32"),
        (LoadConfig("org/model", device="cuda"), "bfloat16", "bfloat16"),
    ],
)
def test_kernels_are_compiled_for_the_gpu_and_the_type_that_is_served(
    config: LoadConfig, stored: str, dtype: str, tmp_path: Path, started: list[list[str]]
) -> None:
    folder = folder_with(tmp_path, dtype=stored)
    compile_ahead(config, EngineConfig(), folder)
    (command,) = started
    assert command[:3] == [sys.executable, "-m", "precompile"]
    options = f"{folder} --config-only --targets 90 --dtypes {dtype}"
    assert command[3:] == options.split()


def test_the_longest_sequence_is_passed_on(tmp_path: Path, started: list[list[str]]) -> None:
    compile_ahead(MODEL, EngineConfig(max_total_tokens=2048), folder_with(tmp_path))
    assert started[0][-2:] == ["--max-total-tokens", "2048"]


@pytest.mark.parametrize(
    "config",
    [
        LoadConfig("m", device="cpu"),
        LoadConfig("m", quantize="bitsandbytes"),
        LoadConfig("m", trust_remote_code=True),
    ],
)
def test_nothing_is_compiled_where_other_kernels_are_launched(
    config: LoadConfig, tmp_path: Path, started: list[list[str]]
) -> None:
    compile_ahead(config, EngineConfig(), folder_with(tmp_path))
    assert started == []


def test_nothing_is_compiled_for_a_quantised_checkpoint(
    tmp_path: Path, started: list[list[str]]
) -> None:
    quantised = BitsAndBytesConfig(load_in_4bit=True)
    compile_ahead(MODEL, EngineConfig(), folder_with(tmp_path, quantization_config=quantised))
    assert started == []


@pytest.mark.parametrize("content", [None, "", "{}", '{"model_type": "unheard-of"}'])
def test_a_folder_that_cannot_be_read_is_left_to_the_loader(
    content: str | None, tmp_path: Path, started: list[list[str]]
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    compile_ahead(MODEL, EngineConfig(), tmp_path)
    assert started == []


def test_nothing_is_compiled_without_a_gpu(
    tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compile_ahead(MODEL, EngineConfig(), folder_with(tmp_path))
    assert started == []


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("print('sm_90 bfloat16: 7 s')", "kernels are compiled: sm_90 bfloat16: 7 s"),
        ("", "kernels are compiled: they were before"),
        ("raise SystemExit('no compiler')", "not ahead: no compiler"),
    ],
)
def test_the_log_tells_how_it_ended(
    script: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "engine")
    start_command([sys.executable, "-c", script]).join(60)
    assert told in caplog.text
