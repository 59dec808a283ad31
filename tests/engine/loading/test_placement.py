"""Tensors of a checkpoint arrive unchanged, and where merging moves none of them."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine.device.upload import Uploads
from engine.linear.merged import MergedLinear
from engine.loading.checkpoint import Checkpoint
from engine.loading.lazy_shards import Shards
from engine.loading.loader import load_lazily, prepare_model
from engine.loading.placement import Placement, layout_of
from tests.engine.device.test_upload import LateCopies
from tests.engine.models import FAMILIES, FUSED, build, byte_tokenizer

DEVICE = torch.device("cpu")
NAMES = sorted(FAMILIES)


@cache
def original(name: str) -> PreTrainedModel:
    config_class, options = FAMILIES[name]
    return build(config_class, **options)


def save(name: str, folder: Path, shards: bool) -> Path:
    largest = 60_000 if shards else "5GB"
    original(name).save_pretrained(folder, max_shard_size=largest)
    return folder


def placed(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model as for a GPU, but to memory of the host."""
    config = AutoConfig.from_pretrained(folder)
    placement = Placement(layout_of(config, dtype), DEVICE, Uploads(LateCopies, 1000))
    shards = Shards.in_folder(folder)
    assert shards is not None
    options: dict[str, Any] = {"config": config, "dtype": dtype, "device_map": {"": DEVICE}}
    with shards.loading():
        tensors = shards.tensors(placement)
        model, report = load_lazily(folder, tensors, options | {"output_loading_info": True})
    assert not any(report.values())
    return model


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_the_one_that_transformers_loads(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = save(name, tmp_path, shards=dtype is torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype).state_dict()
    model = placed(saved, dtype)
    actual = model.state_dict()
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == actual[key].dtype
        assert torch.equal(tensor, actual[key]), key


def joints(model: nn.Module) -> dict[int, nn.Linear]:
    found = [module.joint.linear for module in model.modules() if isinstance(module, MergedLinear)]
    return {id(linear): linear for linear in found}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "mixtral", "starcoder2"])
def test_merging_moves_no_weight(name: str, tmp_path: Path) -> None:
    saved = save(name, tmp_path, shards=True)
    model = placed(saved, torch.float32)
    before = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    prepare_model(model, byte_tokenizer(), Checkpoint(saved, "placed"), FUSED)
    merged = joints(model)
    assert merged
    for linear in merged.values():
        for parameter in linear.parameters():
            assert parameter.untyped_storage()._cdata in before


def test_a_folder_without_safetensors_has_no_shards(tmp_path: Path) -> None:
    assert Shards.in_folder(tmp_path) is None
