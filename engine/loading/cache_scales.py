"""Finds the factors that a checkpoint has for keys and values in an 8-bit cache.

Tools that quantise a model measure how large its keys and values become, and store by how much to
divide them, so that they use the range of float8. transformers knows no such tensors and leaves
them in the files. The tools name them in several ways, beside an attention module or its
projections; those below are the ones that vLLM and SGLang take too.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from engine.attention.kv_cache import AttentionCall
from engine.core.errors import LoadError

_SUFFIXES: dict[str, Literal["k", "v", "kv"]] = {
    ".k_proj.k_scale": "k",
    ".k_proj.output_scale": "k",
    ".qkv_proj.k_scale": "k",
    ".attn.k_scale": "k",
    ".k_scale": "k",
    ".v_proj.v_scale": "v",
    ".v_proj.output_scale": "v",
    ".qkv_proj.v_scale": "v",
    ".attn.v_scale": "v",
    ".v_scale": "v",
    ".kv_scale": "kv",
}
"""How the names end, and whether the factor is of keys, values or both; longer ones first."""


def with_cache_scales(
    calls: Sequence[AttentionCall], model: PreTrainedModel, folder: Path
) -> list[AttentionCall]:
    """Return the calls with the factors that the checkpoint in `folder` has for their modules.

    Raises LoadError if there are neither one nor as many as heads.
    """
    scales = _read_scales(folder)
    names = {module: name for name, module in model.named_modules()}
    return [
        replace(
            call,
            k_scale=_by_head(scales.get((names[call.module], "k")), call),
            v_scale=_by_head(scales.get((names[call.module], "v")), call),
        )
        for call in calls
    ]


def _read_scales(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Return all factors by the name of their module, and "k" or "v"."""
    scales: dict[tuple[str, str], Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                suffix = next(filter(name.endswith, _SUFFIXES), None)
                if suffix is None:
                    continue
                scale = tensors.get_tensor(name).float().flatten()
                for which in _SUFFIXES[suffix]:
                    scales[name.removesuffix(suffix), which] = scale
    return scales


def _by_head(scale: Tensor | None, call: AttentionCall) -> Tensor | None:
    """Return the factor of each head; None where it is not positive, as if never measured."""
    if scale is None or not (scale > 0).all():
        return None
    if len(scale) not in (1, call.num_kv_heads):
        raise LoadError(
            f"the checkpoint has {len(scale)} cache scales for {call.num_kv_heads} key/value heads"
        )
    return scale.expand(call.num_kv_heads).contiguous()
