"""Fixes rotary frequencies that depend on the longest position of a step."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.inference_mode()
def freeze_rotary(model: PreTrainedModel, max_total_tokens: int) -> None:
    """Fix length-dependent rotary frequencies for sequences of this length.

    `longrope` and `dynamic` choose their frequencies by the longest position of the whole
    packed row: one long request would change its neighbours, and reading that position
    synchronises with the device. So transformers' own update runs once more, for the longest
    sequence there can be, and is then switched off. It may be called again for another length.
    """
    position_ids = torch.tensor([[max_total_tokens - 1]], device=model.device)
    x = torch.zeros(1, dtype=model.dtype, device=model.device)
    for module in model.modules():
        if hasattr(module, "rope_type"):
            _thaw(module)
            _freeze(module, x, position_ids)


def _thaw(module: Any) -> None:
    """Undo an earlier call, which was for another length."""
    before = vars(module).setdefault("before_freezing", _state(module))
    vars(module).update({name: _copied(value) for name, value in before.items()})


def _state(module: nn.Module) -> dict[str, Any]:
    """Return what transformers' update and `_freeze` change in a module."""
    changed = {"_buffers", "rope_type"}
    names = [n for n in vars(module) if n in changed or n.endswith("max_seq_len_cached")]
    return {name: _copied(vars(module)[name]) for name in names}


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _freeze(module: Any, x: torch.Tensor, position_ids: torch.Tensor) -> None:
    kinds = module.rope_type
    if isinstance(kinds, dict):
        for layer_type, kind in list(kinds.items()):
            if _is_length_dependent(kind):
                module(x, position_ids, layer_type=layer_type)
                kinds[layer_type] = "default"
    elif _is_length_dependent(kinds):
        module(x, position_ids)
        module.rope_type = "default"


def _is_length_dependent(rope_type: str) -> bool:
    return rope_type == "longrope" or "dynamic" in rope_type
