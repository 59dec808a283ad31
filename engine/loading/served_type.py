"""Decides the type that a model is served in."""

import torch
from transformers import PreTrainedConfig

from engine.device.precision import half_precision


def own_type(config: PreTrainedConfig) -> torch.dtype | None:
    """Return the type of the checkpoint's weights as its config.json says, None if it does not."""
    own = config.get_text_config(decoder=True).dtype or config.dtype
    return getattr(torch, own) if isinstance(own, str) else own


def served_type(asked: str | None, own: torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the type that was asked for by name, or else float32 on a CPU; on a GPU the
    checkpoint's own, and 16 bits in place of float32 or if its own is not known.
    """
    if asked is not None:
        named: torch.dtype = getattr(torch, asked)
        return named
    if device.type == "cpu":
        return torch.float32
    return own if own is not None and own.itemsize <= 2 else half_precision(device)
