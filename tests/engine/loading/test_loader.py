"""Models are loaded by name and served; errors name the reason and what to do."""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
)

from engine.core.config import EngineConfig, LoadConfig, Quantization
from engine.core.errors import DownloadFailed, LoadError
from engine.engine import Engine
from engine.loading import loader
from engine.loading.checkpoint import Checkpoint
from engine.loading.lazy_shards import Shards
from engine.loading.loader import (
    _placement,
    _scale_rotary,
    _served_type,
    _shards,
    load,
    prepare_model,
)
from tests.engine.driving import check_greedy, greedy, make_engine, run
from tests.engine.models import build, byte_tokenizer, family, reference


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    reference("llama").save_pretrained(tmp_path)
    byte_tokenizer()._hf.save_pretrained(tmp_path)
    return tmp_path


def test_a_local_folder_is_served(saved: Path) -> None:
    loaded = load(LoadConfig(str(saved)))
    request = greedy([1, 2, 3], 5)
    check_greedy(reference("llama"), run(make_engine(loaded), [(0, request)]), request)
    assert loaded.info.model_id == str(saved)
    assert loaded.max_positions == 256


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_has_the_configured_dtype(saved: Path, dtype: str) -> None:
    loaded = load(LoadConfig(str(saved), dtype=dtype))
    assert loaded.model.dtype == getattr(torch, dtype)
    request = greedy([1, 2, 3], 5)
    assert len(run(make_engine(loaded), [(0, request)]).ids(request)) == 5


@pytest.mark.parametrize(
    ("stored", "asked", "capability", "served"),
    [
        ("float32", None, (9, 0), "bfloat16"),
        ("float32", None, (8, 0), "bfloat16"),
        ("float32", None, (7, 5), "float16"),
        ("float32", "float32", (9, 0), "float32"),
        ("float32", "float16", (9, 0), "float16"),
        ("bfloat16", None, (9, 0), "bfloat16"),
        ("float16", None, (9, 0), "float16"),
        ("float16", "float32", (9, 0), "float32"),
    ],
)
@pytest.mark.parametrize("says", [True, False], ids=["config says", "config is silent"])
def test_a_gpu_serves_float32_in_16_bits_and_says_so(
    stored: str,
    asked: str | None,
    capability: tuple[int, int],
    served: str,
    says: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build(LlamaConfig)
    nn.Module.to(model, getattr(torch, stored)).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    if not says:
        config.dtype = None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    caplog.set_level("INFO", "engine")
    shards = Shards.in_folder(tmp_path)
    options = LoadConfig("some", dtype=asked)
    dtype = _served_type(options, config, tmp_path, shards, torch.device("cuda"))
    assert dtype == getattr(torch, served)
    told = "served in" in caplog.text and "--dtype float32" in caplog.text
    assert told == (stored == "float32" and asked is None)


def test_a_type_that_no_file_tells_is_said_to_be_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    caplog.set_level("INFO", "engine")
    config = LlamaConfig()
    config.dtype = None
    dtype = _served_type(LoadConfig("some"), config, tmp_path, None, torch.device("cuda"))
    assert dtype == torch.bfloat16
    assert "is told by no file" in caplog.text


CUDA = torch.device("cuda")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("kind", ["safetensors", "own code", "pickle"])
def test_only_for_a_gpu_a_complete_folder_is_loaded_tensor_by_tensor(
    device: str, kind: str, saved: Path
) -> None:
    model_config = AutoConfig.from_pretrained(saved)
    if kind == "pickle":
        (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    config = LoadConfig(str(saved), trust_remote_code=kind == "own code")
    shards = _shards(Checkpoint(saved, "some"), config, model_config, torch.device(device))
    assert (shards is not None) == (device == "cuda" and kind == "safetensors")


@pytest.mark.parametrize("quantize", [None, "bitsandbytes-nf4"])
def test_what_is_quantised_is_not_placed_beside_other_tensors(
    quantize: Quantization | None, saved: Path
) -> None:
    config, model_config = LoadConfig("some", quantize=quantize), AutoConfig.from_pretrained(saved)
    assert _placement(config, model_config, torch.bfloat16, torch.device("cpu")) is None
    placement = _placement(config, model_config, torch.bfloat16, CUDA)
    assert placement is not None
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (name in placement._shared) == (quantize is None)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_a_cpu_serves_float32_whatever_the_checkpoint_has(stored: str, tmp_path: Path) -> None:
    model = build(LlamaConfig)
    nn.Module.to(model, getattr(torch, stored)).save_pretrained(tmp_path)
    byte_tokenizer()._hf.save_pretrained(tmp_path)
    assert load(LoadConfig(str(tmp_path), device="cpu")).model.dtype is torch.float32


def test_products_of_16_bits_are_summed_in_float32(saved: Path) -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = True
    matmul.allow_fp16_reduced_precision_reduction = True
    load(LoadConfig(str(saved)))
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction


def test_the_tokenizer_is_loaded_beside_the_weights(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the two waits for the other to begin."""
    both = threading.Barrier(2, timeout=60)

    def meeting(work: Callable[..., Any], *args: Any) -> Any:
        both.wait()
        return work(*args)

    for name in ("_load_tokenizer", "_load_weights"):
        monkeypatch.setattr(loader, name, partial(meeting, getattr(loader, name)))
    assert load(LoadConfig(str(saved))).tokenizer.encode("a")


def test_if_tokenizer_and_weights_are_broken_the_tokenizer_is_named(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{")
    (saved / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match=r"tokenizer\.json"):
        load(LoadConfig(str(saved)))


def test_rotary_positions_are_scaled_as_configured(saved: Path) -> None:
    loaded = load(LoadConfig(str(saved), rope=("linear", 4.0)))
    model_config = AutoConfig.from_pretrained(saved)
    model_config.rope_parameters |= {"rope_type": "linear", "factor": 4.0}
    expected = AutoModelForCausalLM.from_pretrained(saved, config=model_config, dtype=torch.float32)
    request = greedy([1, 2, 3], 20)
    check_greedy(expected.eval(), run(make_engine(loaded), [(0, request)]), request)
    own = load(LoadConfig(str(saved))).model.model.rotary_emb
    torch.testing.assert_close(4 * loaded.model.model.rotary_emb.inv_freq, own.inv_freq)


def test_each_kind_of_layer_keeps_its_rotary_base() -> None:
    config = Gemma3TextConfig()
    assert config.rope_parameters is not None
    bases = {kind: own["rope_theta"] for kind, own in config.rope_parameters.items()}
    _scale_rotary(config, "dynamic", 2.0)
    assert config.rope_parameters == {
        kind: {"rope_theta": base, "rope_type": "dynamic", "factor": 2.0}
        for kind, base in bases.items()
    }
    assert len(set(bases.values())) == 2


def test_scaling_a_model_without_rotary_positions_is_refused() -> None:
    with pytest.raises(LoadError, match="leave out --rope-scaling"):
        _scale_rotary(GPT2Config(), "linear", 2.0)


def test_the_chat_template_is_read_from_the_configured_file(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"chat_template": "{% for m in messages %}<{{ m.content }}>{% endfor %}"}')
    loaded = load(LoadConfig(str(saved), tokenizer_config_path=str(other)))
    assert loaded.tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "<hi>"


@pytest.mark.parametrize("content", [None, "", "{}", "[]"])
def test_a_file_without_a_chat_template_is_refused(
    saved: Path, tmp_path: Path, content: str | None
) -> None:
    other = tmp_path / "other.json"
    if content is not None:
        other.write_text(content)
    with pytest.raises(LoadError, match=r"no chat template can be read from .*other\.json"):
        load(LoadConfig(str(saved), tokenizer_config_path=str(other)))


def test_a_missing_gguf_file_is_refused() -> None:
    with pytest.raises(DownloadFailed, match="there is no file"):
        load(LoadConfig("/nowhere/model.gguf"))


def test_a_sequence_longer_than_the_cache_is_refused() -> None:
    config = EngineConfig(num_blocks=4, max_total_tokens=65)
    with pytest.raises(LoadError, match=r"max_total_tokens=65.*room for 64"):
        Engine(family("llama"), config)


def test_the_summary_gives_the_reason_of_each_limit() -> None:
    summary = "\n".join(make_engine(family("llama")).summary())
    assert "max_total_tokens 256: the model's maximum" in summary
    assert "max_batch_tokens 64: set" in summary


def test_longrope_does_not_change_with_the_neighbours() -> None:
    """One long request would otherwise switch every other to the long frequencies."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    model = build(
        Phi3Config,
        rope_parameters=rope | factors,
        original_max_position_embeddings=64,
        max_position_embeddings=256,
    )
    loaded = prepare_model(model, byte_tokenizer(), Checkpoint(Path("/nowhere"), "tiny-phi3"))
    alone, neighbour = greedy([1, 2, 3], 12), greedy(range(100), 12)
    expected = run(make_engine(loaded), [(0, alone)]).ids(alone)
    in_company = greedy([1, 2, 3], 12)
    answers = run(make_engine(loaded), [(0, in_company), (0, neighbour)])
    assert answers.ids(in_company) == expected


def test_the_summary_tells_the_weights_and_what_the_allocator_holds_beyond_them() -> None:
    engine = make_engine(family("llama"))
    assert "gaps" not in engine.summary()[0]
    engine.info = replace(engine.info, weight_bytes=3 << 30, unused_bytes=1 << 28)
    assert "3.00 GiB of weights and 0.25 GiB of unusable gaps, on cpu" in engine.summary()[0]
