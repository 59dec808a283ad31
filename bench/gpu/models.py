"""Models of real shapes with random weights, which take as long as the trained ones."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from bench.workload import LengthMix, LoadPlan, make_prompts
from engine.loading.checkpoint import Checkpoint
from engine.loading.loader import LoadedModel, prepare_model
from engine.text.tokenizer import Tokenizer

CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "Llama-3.1-8B": (
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "Qwen3-8B": (
        Qwen3Config,
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "Gemma-2-9B": (
        Gemma2Config,
        {
            "vocab_size": 256000,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
        },
    ),
    # All 8 experts of a layer but few layers: the same kernel shapes, in 23 GB instead of 93.
    "Mixtral-8x7B-8-layers": (
        MixtralConfig,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "Phi-3-mini": (
        Phi3Config,
        {
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "sliding_window": 2047,
        },
    ),
    "gpt2-xl": (
        GPT2Config,
        {"vocab_size": 50257, "n_positions": 1024, "n_embd": 1600, "n_layer": 48, "n_head": 25},
    ),
    "Llama-3.2-1B": (
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-0.6B": (
        Qwen3Config,
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
    "tiny": (
        LlamaConfig,
        {
            "vocab_size": 2048,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
        },
    ),
    "tiny-experts": (
        MixtralConfig,
        {
            "vocab_size": 2048,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 4096,
        },
    ),
    "tiny-gpt2": (
        GPT2Config,
        {
            "vocab_size": 2048,
            "n_positions": 64,
            "n_embd": 64,
            "n_layer": 1,
            "n_head": 4,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
}


@torch.no_grad()
def build(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model with transformers, on the device; no token ends a sequence.

    Embeddings are scaled to the size of the layers' outputs. transformers initialises them to a
    fiftieth of that, with which rounding errors grow from layer to layer as in no trained model,
    to half of the load probe's tolerance.
    """
    config_class, options = CONFIGS[name]
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config_class(**options), dtype=dtype
        )
    if not model.config.tie_word_embeddings:
        model.get_input_embeddings().get_parameter("weight").normal_()
    scale = (2 * model.config.num_hidden_layers) ** -0.5
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.removesuffix(".weight").endswith(("o_proj", "down_proj")):
            parameter.mul_(scale)
    model.generation_config.eos_token_id = []
    return model.eval()


def load(name: str, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    checkpoint = Checkpoint(Path("/random"), name)
    vocab_size = CONFIGS[name][1]["vocab_size"]
    return prepare_model(build(name, device, dtype), word_tokenizer(vocab_size), checkpoint)


def word_tokenizer(vocab_size: int) -> Tokenizer:
    return Tokenizer(hf_tokenizer(vocab_size))


def hf_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each word of the load generator and text for every id.

    So prompts have the generator's lengths, and decoding an answer costs what text costs.
    """
    plan = LoadPlan("tgi", 64, LengthMix.parse("200"), LengthMix.parse("1"), concurrency=1)
    _, prompts = make_prompts(plan)
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained = FastTokenizer(models.BPE())
    trained.pre_tokenizer = splitter
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([prompt.text for prompt in prompts], trainer)
    learned = json.loads(trained.to_str())["model"]
    vocab = learned["vocab"]
    vocab |= {f"Ġ{i}": i for i in range(len(vocab), vocab_size)}
    merges = [tuple(merge) for merge in learned["merges"]]
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=merges))
    fast.pre_tokenizer = splitter
    fast.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=fast)
