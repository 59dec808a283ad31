"""Whatever part of loading runs out of memory, the error says what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.config import LoadConfig
from engine.core.errors import LoadError
from engine.linear import merged
from engine.loading import loader, probe
from tests.engine.models import FUSED, byte_tokenizer, reference


def run_out(*_: object, **__: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def run_out_later(count: int, work: Callable[..., Any]) -> Callable[..., Any]:
    """Do `work` so many times, and then run out of memory."""
    left = iter(range(count))

    def work_or_run_out(*args: Any, **kwargs: Any) -> Any:
        return work(*args, **kwargs) if next(left, None) is not None else run_out()

    return work_or_run_out


PARTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the probe's forward": lambda patch: patch.setattr(probe, "_positions", run_out),
    "merging the first linears": lambda patch: patch.setattr(merged, "_concatenated", run_out),
    "merging later linears": lambda patch: patch.setattr(
        merged, "_concatenated", run_out_later(3, merged._concatenated)
    ),
    "the forward of the fused model": lambda patch: patch.setattr(probe, "_packed_logits", run_out),
    "the last check": lambda patch: patch.setattr(
        probe, "_packed_logits", run_out_later(1, probe._packed_logits)
    ),
    "packing": lambda patch: patch.setattr(loader, "pack_linears", run_out),
}


@pytest.mark.parametrize("part", PARTS)
def test_loading_that_runs_out_of_memory_says_what_to_do(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference("llama", num_hidden_layers=2).save_pretrained(tmp_path)
    byte_tokenizer()._hf.save_pretrained(tmp_path)
    PARTS[part](monkeypatch)
    with pytest.raises(LoadError, match=r"does not fit in the device's memory.*--quantize"):
        loader.load(LoadConfig(str(tmp_path)), ops=FUSED)
