"""A checkpoint's own scales of keys and values are used where the cache has 8 bits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from engine.core.errors import LoadError
from engine.loading.checkpoint import Checkpoint
from engine.loading.loader import LoadedModel, prepare_model
from tests.engine.driving import greedy, make_engine, own_logprobs, run
from tests.engine.models import FUSED, build, byte_tokenizer, reference

PREFIX = "model.layers.1.self_attn"


def load_with(folder: Path, tensors: dict[str, Tensor]) -> LoadedModel:
    save_file(tensors, folder / "model.safetensors")
    model = build(LlamaConfig)
    return prepare_model(model, byte_tokenizer(), Checkpoint(folder, "tiny-scaled"), FUSED)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("qkv_proj.k_scale", "qkv_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
    ],
)
def test_scales_are_found_under_the_names_that_tools_give_them(
    key: str, value: str, tmp_path: Path
) -> None:
    stored = {
        f"{PREFIX}.{key}": torch.tensor(0.5),
        f"{PREFIX}.{value}": torch.tensor([0.25], dtype=torch.bfloat16),
        f"{PREFIX}.q_proj.output_scale": torch.tensor(7.0),
        f"{PREFIX}.k_proj.weight_scale": torch.tensor(9.0),
    }
    first, second, *_ = load_with(tmp_path, stored).calls
    assert first.k_scale is None
    assert first.v_scale is None
    assert second.k_scale is not None
    assert second.v_scale is not None
    assert second.k_scale.tolist() == [0.5] * second.num_kv_heads
    assert second.v_scale.tolist() == [0.25] * second.num_kv_heads


def test_one_scale_may_be_of_keys_and_values(tmp_path: Path) -> None:
    _, call, *_ = load_with(tmp_path, {f"{PREFIX}.kv_scale": torch.tensor(0.5)}).calls
    assert call.k_scale is not None
    assert call.v_scale is not None
    assert call.k_scale.tolist() == call.v_scale.tolist() == [0.5] * call.num_kv_heads


def test_each_head_may_have_its_scale(tmp_path: Path) -> None:
    by_head = torch.tensor([0.5, 2.0])
    _, call, *_ = load_with(tmp_path, {f"{PREFIX}.k_scale": by_head.view(2, 1, 1)}).calls
    assert call.k_scale is not None
    assert call.k_scale.tolist() == [0.5, 2.0]


def test_scales_that_fit_no_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="3 cache scales for 2 key/value heads"):
        load_with(tmp_path, {f"{PREFIX}.k_scale": torch.ones(3)})


def test_a_scale_that_was_never_measured_is_none(tmp_path: Path) -> None:
    _, call, *_ = load_with(tmp_path, {f"{PREFIX}.k_scale": torch.tensor(0.0)}).calls
    assert call.k_scale is None


@pytest.mark.parametrize("is_scaled", [False, True])
def test_values_beyond_the_range_of_8_bits_need_the_scales(is_scaled: bool, tmp_path: Path) -> None:
    """Values a thousand times as large, and an output projection that makes up for it."""
    model = build(LlamaConfig)
    stored = {"none": torch.ones(1)}
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.v_proj.weight.data *= 1024
        layer.self_attn.o_proj.weight.data /= 1024
        if is_scaled:
            stored[f"model.layers.{number}.self_attn.v_scale"] = torch.tensor(16.0)
    save_file(stored, tmp_path / "model.safetensors")
    loaded = prepare_model(model, byte_tokenizer(), Checkpoint(tmp_path, "tiny-scaled"), FUSED)
    request = greedy(b"once upon a time there was", 4)
    answers = run(make_engine(loaded, kv_cache_dtype="fp8_e4m3fn"), [(0, request)])
    ids, logprobs = answers.ids(request), answers.logprobs(request)
    own = own_logprobs(reference("llama"), request.prompt_ids, ids)[torch.arange(4), ids]
    difference = (torch.tensor(logprobs) - own).abs().max()
    assert (difference < 0.5) == is_scaled
