"""Tiny models with random weights, of many families, and a byte tokenizer for them."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Starcoder2Config,
)

from engine.device.timer import Timer
from engine.loading.checkpoint import Checkpoint
from engine.loading.loader import LoadedModel, prepare_model
from engine.text.tokenizer import Tokenizer
from kernels.ops import TORCH, Ops

VOCAB_SIZE = 258
MAX_POSITIONS = 256
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
}
_WINDOW = 12  # shorter than the prompts

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": _WINDOW}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "gemma2": (
        Gemma2Config,
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": _WINDOW},
    ),
    "gpt2": (GPT2Config, {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": MAX_POSITIONS}),
    "phi3": (Phi3Config, {}),
    "starcoder2": (Starcoder2Config, {"sliding_window": _WINDOW}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "olmo2": (Olmo2Config, {}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 16, "sliding_window": _WINDOW}),
    "gpt_oss": (
        GptOssConfig,
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": _WINDOW,
        },
    ),
    "phimoe": (PhimoeConfig, {"num_local_experts": 4, "sliding_window": _WINDOW}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
    ),
    "olmoe": (OlmoeConfig, {"num_experts": 8, "num_experts_per_tok": 3}),
    "deepseek_v3": (
        DeepseekV3Config,
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "moe_intermediate_size": 40,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
        },
    ),
}
MIXTURES = ("mixtral", "phimoe", "gpt_oss", "qwen3_moe", "olmoe", "deepseek_v3")
"""The families whose tokens choose among experts."""


def build(config_class: type[PreTrainedConfig], **options: Any) -> PreTrainedModel:
    """Return a model whose random weights spread enough for its logits to differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**_COMMON, **options}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None
    return model.eval()


@cache
def byte_tokenizer() -> Tokenizer:
    """One token per byte, 256 for the start and 257 for the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")
    )


FUSED = replace(TORCH, fuses=True)
"""The torch kernels, with the fusions that a GPU's kernels have."""


@cache
def family(name: str) -> LoadedModel:
    return prepared(name, FUSED)


def prepared(
    name: str,
    ops: Ops | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    timer: Timer | None = None,
    batch_invariant: bool = False,
    **options: Any,
) -> LoadedModel:
    """Return a new model of this family, prepared for the engine, to run on these kernels."""
    config_class, family_options = FAMILIES[name]
    checkpoint = Checkpoint(Path("/nowhere"), f"tiny-{name}")
    model = build(config_class, **(family_options | options))
    nn.Module.to(model, device, dtype)
    return prepare_model(
        model,
        byte_tokenizer(),
        checkpoint,
        ops,
        timer=timer,
        batch_invariant=batch_invariant,
    )


@cache
def reference(name: str, **options: Any) -> PreTrainedModel:
    """Return the same model as transformers builds it, unchanged by the engine."""
    config_class, family_options = FAMILIES[name]
    return build(config_class, **(family_options | options))
