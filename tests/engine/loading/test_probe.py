"""Attention calls and masks are discovered at load; models that cannot be served are refused."""

import pytest
import torch
from transformers import (
    BloomConfig,
    DiffLlamaConfig,
    DogeConfig,
    FalconH1Config,
    GPTBigCodeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from engine.core.errors import LoadError
from engine.loading.probe import (
    discover,
    read_mask,
    reference_logits,
    verify,
)
from kernels.ops import TORCH
from kernels.paged_attention.mask import MaskSpec
from tests.engine.models import build, family

CPU = torch.device("cpu")


def test_masks_are_recognised_by_what_they_allow() -> None:
    left = torch.zeros(1, dtype=torch.int64)
    assert read_mask(causal_mask_function, 512, CPU) == MaskSpec()
    assert read_mask(sliding_window_causal_mask_function(100), 512, CPU) == MaskSpec(window=100)
    assert read_mask(chunked_causal_mask_function(128, left), 500, CPU) == MaskSpec(chunk=128)
    assert read_mask(chunked_causal_mask_function(128, left), 513, CPU) == MaskSpec(chunk=128)


def test_a_mask_of_another_kind_is_refused() -> None:
    with pytest.raises(LoadError, match="neither causal, sliding nor chunked"):
        read_mask(lambda _b, _h, q, k: (k <= q) & (k % 2 == 0), 512, CPU)


def test_windows_alternate_between_layers() -> None:
    masks = [call.mask for call in family("gemma2").calls]
    assert masks == [MaskSpec(window=12), MaskSpec()] * 2


def test_a_window_that_only_the_mask_shows_is_found() -> None:
    assert {call.mask for call in family("phimoe").calls} == {MaskSpec(window=12)}


@pytest.mark.parametrize(
    ("config_class", "options", "num_calls"),
    [
        (OPTConfig, {"ffn_dim": 80, "word_embed_proj_dim": 48}, 4),
        (GPTBigCodeConfig, {"n_embd": 48, "n_head": 4}, 4),
        (DiffLlamaConfig, {}, 8),
        (
            Llama4TextConfig,
            {
                "head_dim": 16,
                "intermediate_size_mlp": 80,
                "num_local_experts": 2,
                "attention_chunk_size": 16,
            },
            4,
        ),
    ],
)
def test_less_common_families_are_served(
    config_class: type[PreTrainedConfig], options: dict[str, object], num_calls: int
) -> None:
    model = build(config_class, **options)
    calls = discover(model)
    verify(model, calls, reference_logits(model), TORCH)
    assert len(calls) == num_calls


@pytest.mark.parametrize(
    ("config_class", "options", "reason"),
    [
        (BloomConfig, {"n_head": 4, "n_layer": 2}, "does not call transformers' attention"),
        (MambaConfig, {"num_hidden_layers": 2}, "does not call transformers' attention"),
        (
            Qwen3NextConfig,
            {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
            "only 1 of 4 layers",
        ),
        (
            FalconH1Config,
            {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_ssm": 96, "mamba_d_state": 16},
            "packed logits are off",
        ),
        (DogeConfig, {}, "a mask of its own making"),
    ],
)
def test_a_model_that_would_answer_wrongly_is_refused_by_name(
    config_class: type[PreTrainedConfig], options: dict[str, object], reason: str
) -> None:
    model = build(config_class, **options)
    with pytest.raises(LoadError, match=reason) as refusal:
        verify(model, discover(model), reference_logits(model), TORCH)
    assert type(model).__name__.removesuffix("ForCausalLM") in str(refusal.value)


def test_a_wrong_mask_does_not_pass_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask read one token too narrow is noticed."""
    model = build(MistralConfig, sliding_window=12)
    calls = discover(model)
    monkeypatch.setattr("engine.loading.probe.read_mask", lambda *_: MaskSpec(window=11))
    with pytest.raises(LoadError, match="off by"):
        verify(model, discover(model), reference_logits(model), TORCH)
    verify(model, calls, reference_logits(model), TORCH)


def test_half_precision_is_held_to_its_own_tolerance() -> None:
    model = build(LlamaConfig).bfloat16()
    verify(model, discover(model), reference_logits(model), TORCH)
