"""Loading a checkpoint: every value arrives, and hardly any memory is lost to holes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bench.gpu import cold_start, models
from engine.core.config import LoadConfig
from engine.device.upload import CudaCopies, Uploads
from engine.loading.lazy_shards import Shards
from engine.loading.loader import load
from engine.loading.placement import Placement

DEVICE = torch.device("cuda")
NAME = "Llama-3.1-8B"
NUM_LAYERS = 8


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A checkpoint of an 8B model's shapes in float32, in memory, with a quarter of its layers."""
    config_class, options = models.CONFIGS[NAME]
    models.CONFIGS["short"] = config_class, options | {"num_hidden_layers": NUM_LAYERS}
    try:
        with cold_start.checkpoint(models.build("short", DEVICE, torch.float32)) as written:
            torch.cuda.empty_cache()
            yield written
    except cold_start.NoRoom as reason:
        pytest.skip(str(reason))
    finally:
        del models.CONFIGS["short"]


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_less_than_three_hundredths_of_the_weights_are_lost(
    folder: Path, dtype: str | None
) -> None:
    torch.cuda.empty_cache()
    info = load(LoadConfig(str(folder), dtype=dtype)).info
    assert info.dtype == (dtype or "bfloat16")
    assert info.unused_bytes < 0.03 * info.weight_bytes


@pytest.mark.parametrize("buffer_bytes", [4096, 8 << 20])
def test_every_value_arrives(folder: Path, buffer_bytes: int) -> None:
    """Read by this thread while the device is busy, from buffers that are used again and again."""
    shards = Shards.in_folder(folder)
    assert shards is not None
    placement = Placement(None, DEVICE, Uploads(lambda: CudaCopies(DEVICE), buffer_bytes))
    busy = torch.randn(4096, 4096, device=DEVICE)
    with shards.loading():
        for name, tensor in list(shards.tensors(placement).items())[:20]:
            busy = busy @ busy / 64
            actual = tensor[...]
            for path in folder.glob("*.safetensors"):
                with safe_open(path, framework="pt") as file:
                    if name in file.keys():  # noqa: SIM118  (no dict)
                        assert torch.equal(actual.cpu(), file.get_tensor(name))
