"""Discovers how a loaded model attends, and verifies its logits through the paged cache.

No model is known by name. `discover` runs one short forward with a recording attention
function in place of the real one, and reads each call's geometry, mask and sharing from what
the model passes. `reference_logits` computes the logits of two prompts before anything about the
model is changed. `verify` then runs both prompts through the paged cache, in chunks, side by
side in one packed row, and compares every logit. A model that cannot be served correctly is
refused with the reason.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from engine.attention.interface import ATTENTION_NAME, unsupported_keywords
from engine.attention.kv_cache import AttentionCall, bind_kv_cache
from engine.attention.plan import FixedTables, StepSequences
from engine.core.config import BLOCK_SIZE
from engine.core.errors import LoadError
from engine.loading.reasons import is_out_of_memory
from kernels.ops import Ops
from kernels.paged_attention.mask import NO_LIMIT, MaskSpec

_RECORDER_NAME = "skiff_recorder"
# Bounds of the root mean square of the logits' difference, relative to their spread.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Switch every part of the model to the attention function of this name.

    The name is set on the configurations directly, because the library's public call skips
    models that it assumes not to support it, many of which do.
    """
    configs: dict[int, Any] = {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config")
    }
    for config in configs.values():
        config._attn_implementation_internal = name


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    previous = model.config._attn_implementation
    use_attention(model, name)
    try:
        yield
    finally:
        use_attention(model, previous or "eager")


@torch.inference_mode()
def discover(model: PreTrainedModel) -> list[AttentionCall]:
    """Return the attention calls of one forward, in order.

    Raises LoadError if the model attends outside transformers' interface, or in a way that
    depends on more than positions.
    """
    recorder = _Recorder(_horizon(model))
    ids = _prompt(model, length=5, seed=0)
    name = type(model).__name__
    try:
        with recorder.registered(), _attention(model, _RECORDER_NAME):
            model(input_ids=ids, position_ids=_positions(ids), use_cache=False)
    except LoadError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise LoadError(f"{name} cannot be served: its probe forward failed: {error}") from error
    if not recorder.calls:
        raise LoadError(
            f"{name} cannot be served: it does not call transformers' attention interface"
        )
    return recorder.calls


def _horizon(model: PreTrainedModel) -> int:
    """Return the number of positions over which this model's masks have to be examined."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(int(longest or 1 << 16), 1 << 20)


class _Recorder:
    """An attention function that records its calls, and a mask function that records masks."""

    def __init__(self, horizon: int):
        self.calls: list[AttentionCall] = []
        self._horizon = horizon
        self._masks: list[tuple[Tensor, MaskSpec]] = []
        self._stored: list[tuple[Tensor, Tensor, int]] = []

    @contextmanager
    def registered(self) -> Iterator[None]:
        AttentionInterface.register(_RECORDER_NAME, self.attend)
        AttentionMaskInterface.register(_RECORDER_NAME, self.make_mask)
        try:
            yield
        finally:
            del AttentionInterface._global_mapping[_RECORDER_NAME]
            del AttentionMaskInterface._global_mapping[_RECORDER_NAME]

    def make_mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        mask_function: Callable[..., Any],
        device: torch.device,
        **_: Any,
    ) -> Tensor:
        mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
        self._masks.append((mask, read_mask(mask_function, self._horizon, device)))
        return mask

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        sliding_window: int | None = None,
        **keywords: object,
    ) -> tuple[Tensor, None]:
        self._refuse_unsupported(module, keywords)
        call = AttentionCall(
            module=module,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=key.shape[3],
            value_dim=value.shape[3],
            mask=self._spec(module, attention_mask, sliding_window),
            shared_with=next((i for k, v, i in self._stored if k is key and v is value), None),
        )
        if call.shared_with is None:
            self._stored.append((key, value, len(self.calls)))
        self.calls.append(call)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    def _refuse_unsupported(self, module: nn.Module, keywords: dict[str, object]) -> None:
        """Raise LoadError if the call asks for what serving would silently leave undone."""
        unsupported = unsupported_keywords(keywords)
        if unsupported:
            raise LoadError(f"{type(module).__name__} passes {unsupported[0]} to attention")
        if not getattr(module, "is_causal", True):
            raise LoadError(f"{type(module).__name__} attends to later tokens")

    def _spec(self, module: nn.Module, mask: Tensor | None, window: int | None) -> MaskSpec:
        """Return the mask's spec; the window only counts without a mask, as in eager attention."""
        if mask is None:
            return MaskSpec(window=window or NO_LIMIT)
        for known, spec in self._masks:
            if mask is known or mask._base is known:
                return spec
        raise LoadError(f"{type(module).__name__} attends through a mask of its own making")


def read_mask(mask_function: Callable[..., Any], horizon: int, device: torch.device) -> MaskSpec:
    """Recognise a causal, sliding-window or chunked mask by the keys it allows.

    `mask_function(batch, head, query, key)` returns whether a query position may see a key
    position. Raises LoadError for a mask that is none of the three.
    """
    keys = torch.arange(horizon, device=device)

    def visible(query: int) -> Tensor:
        allowed = mask_function(
            torch.tensor(0, device=device),
            torch.tensor(0, device=device),
            torch.tensor(query, device=device),
            keys,
        )
        return torch.as_tensor(allowed, device=device).expand(horizon)

    last = horizon - 1
    oldest = int(visible(last).to(torch.int8).argmax())
    spec = MaskSpec()
    if oldest > 0:
        # A window's oldest key moves with the query, a chunk's does not.
        moved = int(visible(last - 1).to(torch.int8).argmax()) == oldest - 1
        spec = MaskSpec(window=last - oldest + 1) if moved else _read_chunk(visible, oldest)
    for query in {0, 1, last // 3, last // 2, last - 1, last}:
        lower = max(query - spec.window + 1, query // spec.chunk * spec.chunk)
        if not torch.equal(visible(query), (keys <= query) & (keys >= lower)):
            raise LoadError("its attention mask is neither causal, sliding nor chunked")
    return spec


def _read_chunk(visible: Callable[[int], Tensor], boundary: int) -> MaskSpec:
    """Read the chunk size: the query before `boundary`, a chunk's start, sees one whole chunk."""
    return MaskSpec(chunk=boundary - int(visible(boundary - 1).to(torch.int8).argmax()))


@torch.inference_mode()
def reference_logits(model: PreTrainedModel) -> list[Tensor]:
    """Return the logits of the model's own forward for each probe prompt, [length, vocab_size].

    The prompts are ordinary ones, so a trace of this forward shows how the model computes any.
    """
    with _attention(model, "eager"):
        return [model(input_ids=ids, use_cache=False).logits[0].float() for ids in _prompts(model)]


Chunks = tuple[tuple[int, int], ...]
"""Tokens of each of the two prompts in each step. One more step computes all that is left."""
_CHUNKS: Chunks = ((7, 12), (19, 1))
FEW_ROWS: Chunks = (*_CHUNKS, (1, 0), (2, 0), (4, 0))
"""Steps of 1, 2, 4 and 8 rows among others, which may have kernels of their own."""

LogitsCheck = Callable[[list[Tensor], list[Tensor], torch.dtype], str | None]
"""Says what is wrong with the logits of each prompt, None if nothing. See `compare_logits`."""


def compare_logits(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> str | None:
    """Return what is wrong with `actual`, computed in `dtype`; None if it is as expected."""
    worst = max(
        float((a - e).square().mean().sqrt() / e.std().clamp_min(1e-6))
        for a, e in zip(actual, expected, strict=True)
    )
    if not worst <= _TOLERANCE[dtype]:  # NaN is wrong, too
        return f"its packed logits are off by {worst:.2g} of their spread"
    return None


@torch.inference_mode()
def verify(
    model: PreTrainedModel,
    calls: list[AttentionCall],
    expected: list[Tensor],
    ops: Ops,
    check: LogitsCheck = compare_logits,
    chunks: Chunks = _CHUNKS,
) -> None:
    """Raise LoadError unless packed, paged and chunked logits equal the expected ones.

    A model that keeps state between tokens anywhere but in its attention fails here,
    since neither the chunks nor the sequences of a packed row see each other.
    Leaves the model with our attention function selected and a small cache bound.
    """
    problem = find_problem(model, calls, expected, ops, check, chunks)
    if problem is not None:
        raise _refusal(model, calls, problem)


@torch.inference_mode()
def find_problem(
    model: PreTrainedModel,
    calls: list[AttentionCall],
    expected: list[Tensor],
    ops: Ops,
    check: LogitsCheck = compare_logits,
    chunks: Chunks = _CHUNKS,
) -> str | None:
    """Return what is wrong with the model's packed logits; None if they are as expected."""
    use_attention(model, ATTENTION_NAME)
    try:
        actual = _packed_logits(model, calls, _prompts(model), ops, chunks)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"its packed forward failed: {error}"
    return check(actual, expected, model.dtype)


def _refusal(model: PreTrainedModel, calls: list[AttentionCall], reason: str) -> LoadError:
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", len(calls))
    if len(calls) < num_layers:
        reason += f" (only {len(calls)} of {num_layers} layers attend through the KV cache)"
    return LoadError(f"{type(model).__name__} cannot be served: {reason}")


def _packed_logits(
    model: PreTrainedModel,
    calls: list[AttentionCall],
    prompts: list[Tensor],
    ops: Ops,
    chunks: Chunks,
) -> list[Tensor]:
    """Compute the logits of every position in packed steps over shuffled blocks."""
    context = bind_kv_cache(calls, 8, model.dtype, model.device, ops)
    tables = np.array([[5, 2, 7, 0], [3, 6, 1, 4]])
    attention = FixedTables(ops, calls, tables, model.device)
    lengths = np.array([ids.shape[1] for ids in prompts])
    logits: list[list[Tensor]] = [[] for _ in prompts]
    done = np.zeros(len(prompts), dtype=np.int64)
    for chunk in (*map(np.array, chunks), lengths):
        sizes = np.minimum(chunk, lengths - done)
        members = np.flatnonzero(sizes)
        starts, ends = done[members], (done + sizes)[members]
        step = StepSequences(members, starts, sizes[members])
        context.begin(attention.metadata(step))
        ids = torch.cat(
            [prompts[m][:, s:e] for m, s, e in zip(members, starts, ends, strict=True)], dim=1
        )
        position_ids = torch.from_numpy(step.positions)[None].to(model.device)
        out = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits[0].float()
        for member, part in zip(members, out.split(sizes[members].tolist()), strict=True):
            logits[member].append(part)
        done += sizes
    return [torch.cat(parts) for parts in logits]


def _prompts(model: PreTrainedModel) -> list[Tensor]:
    return [_prompt(model, 2 * BLOCK_SIZE + 9, seed=1), _prompt(model, 13, seed=2)]


def _prompt(model: PreTrainedModel, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.config.get_text_config().vocab_size
    return torch.randint(vocab_size, (1, length), generator=generator).to(model.device)


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device)[None]
