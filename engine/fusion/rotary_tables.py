"""Rotary tables: cos and sin of every position, made once, of which each step looks its own up.

A model's rotary module computes them for the positions of each step, with some nine small kernels
where a lookup is one. The tables are what the module itself returns for all positions that there
can be, so a step gets the same bits.
"""

import logging
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_MAX_BYTES = 64 << 20
"""The most memory of one table: 131,072 positions of 128 values each, in 16 bits."""

Tables = dict[str | None, Tensor]
"""By layer type, [num_positions, 2 * columns]: cos and then sin. None: the module has no types."""


class RotaryTables:
    """Has a model's rotary modules look their results up, inside of its `with` block.

    Outside of it the model is as it was, whatever other engine uses it.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, num_positions: int):
        """Make the tables for `num_positions`, where they are small enough and no value differs."""
        x = torch.zeros(1, 1, dtype=model.dtype, device=model.device)
        self._lookups: dict[nn.Module, Callable[..., Any]] = {}
        num_bytes = 0
        for module in model.modules():
            tables = _tables(module, x, num_positions)
            if tables:
                self._lookups[module] = partial(_look_up, module.forward, tables, x.dtype)
                num_bytes += sum(table.nbytes for table in tables.values())
        if self._lookups:
            mib = num_bytes / 2**20
            logger.info("rotary tables of %d positions take %.1f MiB", num_positions, mib)

    def __enter__(self) -> None:
        for module, look_up in self._lookups.items():
            module.forward = look_up

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for module in self._lookups:
            del module.forward


def _look_up(
    original: Callable[..., Any],
    tables: Tables,
    dtype: torch.dtype,
    x: Tensor,
    position_ids: Tensor,
    layer_type: str | None = None,
) -> Any:
    """Return what `original` does, cos and sin [1, T, columns] for position_ids [1, T]."""
    if x.dtype is dtype and position_ids.dim() == 2 and layer_type in tables:
        return embedding(position_ids, tables[layer_type]).chunk(2, dim=-1)
    return original(x, position_ids, **_keywords(layer_type))


def _keywords(layer_type: str | None) -> dict[str, str]:
    return {} if layer_type is None else {"layer_type": layer_type}


def _tables(module: nn.Module, x: Tensor, num_positions: int) -> Tables:
    """Return the tables of a module; none if it is no rotary module of the usual kind."""
    kinds = getattr(module, "rope_type", None)
    if not isinstance(kinds, str | dict):
        return {}
    layer_types = kinds if isinstance(kinds, dict) else (None,)
    made = {each: _table(module, x, num_positions, each) for each in layer_types}
    return {layer_type: table for layer_type, table in made.items() if table is not None}


def _table(
    module: nn.Module, x: Tensor, num_positions: int, layer_type: str | None
) -> Tensor | None:
    """Return one table of a module; None if it would be too large, or differ in any bit."""
    compute = partial(_rows, module, x, layer_type)
    samples = torch.arange(0, num_positions, max(1, num_positions // 7), device=x.device)[None]
    rows = compute(samples)
    if rows is None or num_positions * rows[0].nbytes > _MAX_BYTES:
        return None
    table = compute(torch.arange(num_positions, device=x.device)[None])
    same = table is not None and torch.equal(embedding(samples[0], table), rows)
    return table if same else None


def _rows(
    module: nn.Module, x: Tensor, layer_type: str | None, position_ids: Tensor
) -> Tensor | None:
    """Return the module's cos and sin in a row for each position, [positions, 2 * columns]."""
    try:
        results = module(x, position_ids, **_keywords(layer_type))
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None  # positions of another kind, as of images
    if not isinstance(results, tuple) or [getattr(r, "ndim", 0) for r in results] != [3, 3]:
        return None
    cos, sin = results
    if cos.shape != sin.shape or cos.shape[:2] != position_ids.shape:
        return None
    return torch.cat([cos[0], sin[0]], dim=-1)
