"""Loads a model with its tokenizer, and prepares and verifies it for the engine."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from engine.attention.kv_cache import AttentionCall
from engine.core.config import LoadConfig, RopeScaling
from engine.core.errors import LoadError
from engine.core.metrics import ColdStart, ModelInfo
from engine.device.memory import unused_bytes
from engine.device.precision import sum_in_float32
from engine.device.timer import Timer, make_timer
from engine.device.upload import CudaCopies, Uploads
from engine.experts.interface import has_experts
from engine.fusion.find import fuse, trace_forward
from engine.linear.gemv import use_gemv
from engine.linear.invariant import collecting_products, make_invariant
from engine.linear.packed import pack_linears
from engine.loading.cache_scales import with_cache_scales
from engine.loading.checkpoint import Checkpoint, Found, ignore, locate
from engine.loading.folder_faults import check_settings, naming_the_fault
from engine.loading.lazy_shards import LazyTensor, Shards
from engine.loading.placement import Placement, layout_of
from engine.loading.prefetch import choose_prefetch
from engine.loading.probe import (
    FEW_ROWS,
    LogitsCheck,
    compare_logits,
    discover,
    find_problem,
    reference_logits,
    verify,
)
from engine.loading.quantization import compute_in_served_type, loading_options, quantization_of
from engine.loading.reasons import is_out_of_memory, out_of_memory
from engine.loading.served_type import own_type, served_type
from engine.text.tokenizer import Tokenizer
from kernels.ops import Ops, ops_for

logger = logging.getLogger(__name__)
T = TypeVar("T")

_UNBOUNDED = 1 << 40


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model whose logits through the paged cache were verified.

    eos_token_ids    ids that end a sequence
    max_positions    the longest sequence that the model was made for
    batch_invariant  its linears compute a row the same whatever the rows beside it
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    info: ModelInfo
    calls: list[AttentionCall]
    ops: Ops
    eos_token_ids: frozenset[int]
    max_positions: int
    batch_invariant: bool = False


def load(
    config: LoadConfig,
    cold_start: ColdStart | None = None,
    found: Found = ignore,
    ops: Ops | None = None,
    check: LogitsCheck = compare_logits,
    timer: Timer | None = None,
) -> LoadedModel:
    """Load a model and prepare it for the engine, see `prepare_model`.

    `found` is called with the model's folder before the weights are downloaded. Raises LoadError
    with the reason and what to do.
    """
    cold_start = cold_start or ColdStart()
    with cold_start.phase("download"):
        checkpoint = locate(config.model_id, config.revision, found)
    started = time.perf_counter()
    with cold_start.phase("load"):
        model, tokenizer = _load(checkpoint, config)
    if checkpoint.shards is not None:
        cold_start.move(checkpoint.shards.seconds_since(started), "load", "download")
    with cold_start.phase("verify"):
        try:
            return prepare_model(
                model, tokenizer, checkpoint, ops, check, timer, config.batch_invariant
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise LoadError(
                f"{config.model_id} cannot be loaded: {out_of_memory(error)}"
            ) from error


def _load(checkpoint: Checkpoint, config: LoadConfig) -> tuple[PreTrainedModel, Tokenizer]:
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sum_in_float32()
    path = checkpoint.path
    check_settings(config.model_id, path)
    with naming_the_fault(config.model_id, path, "config.json"):
        model_config = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    with (
        _beside(partial(_load_tokenizer, checkpoint, config)) as tokenizer,
        naming_the_fault(config.model_id, path, "config.json"),
    ):
        model = _load_weights(checkpoint, config, model_config, device)
    return model, tokenizer.result()


@contextmanager
def _beside(work: Callable[[], T]) -> Iterator[Future[T]]:
    """Do some work in a thread of its own, beside what is done in this context, and wait for it.

    If both fail, the work's error is raised.
    """
    with ThreadPoolExecutor(1, "skiff-load-beside") as pool:
        future = pool.submit(work)
        try:
            yield future
        finally:
            future.result()


def _load_tokenizer(checkpoint: Checkpoint, config: LoadConfig) -> Tokenizer:
    with naming_the_fault(config.model_id, checkpoint.path, "tokenizer.json"):
        hf_tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.path, trust_remote_code=config.trust_remote_code
        )
    if not hf_tokenizer.is_fast:
        raise LoadError(f"{config.model_id} has no fast tokenizer (a tokenizer.json)")
    if config.tokenizer_config_path is not None:
        hf_tokenizer.chat_template = _chat_template(Path(config.tokenizer_config_path))
    return Tokenizer(hf_tokenizer)


def _chat_template(path: Path) -> str | list[dict[str, str]]:
    """Return the chat template in a tokenizer_config.json. Raises LoadError."""
    try:
        return json.loads(path.read_text())["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"no chat template can be read from {path}: {error!r}") from None


def prepare_model(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    checkpoint: Checkpoint,
    ops: Ops | None = None,
    check: LogitsCheck = compare_logits,
    timer: Timer | None = None,
    batch_invariant: bool = False,
) -> LoadedModel:
    """Prepare a transformers model that is in memory for the engine, in place.

    `ops` are the kernels to run it with, by default those of its device. `check` compares the
    logits of the prepared model with its own. `timer` times what can be computed in two ways, by
    default on a GPU only. Raises LoadError where the logits differ, and where logits that do not
    depend on the batch are asked for and cannot be had.
    """
    model.eval().requires_grad_(False)
    ops = ops or ops_for(model.device)
    timer = timer or make_timer(model.device)
    weight_bytes = model.get_memory_footprint()
    calls = _replace_modules(model, ops, check, timer, batch_invariant)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        info=ModelInfo(
            model_id=checkpoint.model_id,
            sha=checkpoint.sha,
            pipeline_tag=checkpoint.pipeline_tag,
            dtype=str(model.dtype).removeprefix("torch."),
            device=_device_name(model.device),
            vocab_size=model.config.get_text_config().vocab_size,
            weight_bytes=weight_bytes,
            quantization=quantization_of(model.config),
            unused_bytes=unused_bytes(model.device),
        ),
        calls=with_cache_scales(calls, model, checkpoint.path),
        ops=ops,
        eos_token_ids=_eos_token_ids(model, tokenizer),
        max_positions=_max_positions(model, tokenizer),
        batch_invariant=batch_invariant,
    )


def _replace_modules(
    model: PreTrainedModel,
    ops: Ops,
    check: LogitsCheck,
    timer: Timer | None,
    batch_invariant: bool,
) -> list[AttentionCall]:
    """Have the model's parts computed by our own, verify it, and return its attention calls.

    The order matters:

    1. Before this, while weights are loaded, quantised linears are replaced. Everything below
       then sees the arithmetic that is served.
    2. A forward of the unchanged model is traced, and gives the logits that every later form
       of the model has to give: tracing recognises the model's own modules only.
    3. Experts are replaced, linears of one input merged, and norms, activations and rotations
       fused, where a launch costs more than what it computes.
    4. The linears that are left, merged ones included, are packed for the CPU, and on a GPU
       computed by our own kernel for few rows, where that is faster. This comes last, since
       packed weights cannot be merged, and merged ones take another time. If logits must not
       depend on the batch, they are replaced by those of one tiling instead.
    5. The whole is verified through the paged cache. Then what it prefetches is chosen, and the
       kernels for few rows are verified.

    A layer that adds to what a linear computes, as LoRA does, wraps what step 4 leaves.
    """
    calls = discover(model)
    with trace_forward(model, [call.module for call in calls]) as trace:
        expected = reference_logits(model)
    if ops.fuses:
        fuse(model, trace, ops, partial(find_problem, model, calls, expected, ops, check))
    if batch_invariant:
        timer = None  # what is faster for some numbers of rows computes them in another order
    if timer is not None:
        use_gemv(model, ops, timer)
    elif not ops.is_triton:
        pack_linears(model)
    if batch_invariant:
        _make_invariant(model, ops, partial(find_problem, model, calls, expected, ops, check))
    verify(model, calls, expected, ops, check)
    if timer is not None:
        choose_prefetch(model, calls, ops, timer)
        verify(model, calls, expected, ops, check, FEW_ROWS)
    return calls


def _make_invariant(model: PreTrainedModel, ops: Ops, forward: Callable[[], object]) -> None:
    """Replace the linears by those of one tiling; raise LoadError if other products remain."""
    if not ops.is_triton:
        raise LoadError("--batch-invariant needs a GPU: leave out the flag")
    if has_experts(model):
        raise LoadError("--batch-invariant has no mixtures of experts: leave out the flag")
    make_invariant(model, ops.invariant_linear)
    with collecting_products() as products:
        forward()
    if products:
        raise LoadError(
            f"{type(model).__name__} cannot be served with --batch-invariant: it has matrix "
            f"products outside of its linears ({', '.join(sorted(products))}). Leave out the flag."
        )


def _max_positions(model: PreTrainedModel, tokenizer: Tokenizer) -> int:
    """Return the longest sequence that both the model and its tokenizer are made for."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or _UNBOUNDED
    return min(longest, tokenizer.max_length)


def _load_weights(
    checkpoint: Checkpoint,
    config: LoadConfig,
    model_config: PreTrainedConfig,
    device: torch.device,
) -> PreTrainedModel:
    if config.rope is not None:
        _scale_rotary(model_config, *config.rope)
    transformers_logging.enable_progress_bar()
    shards = _shards(checkpoint, config, model_config, device)
    dtype = _served_type(config, model_config, checkpoint.path, shards, device)
    options: dict[str, Any] = {
        "config": model_config,
        "dtype": dtype,
        "device_map": {"": device},
        **loading_options(checkpoint.model_id, model_config, config.quantize),
    }
    # What does not fit is reported with the rest, by name, instead of in a table.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if shards is None:
        model, report = _load_whole(checkpoint.path, config.trust_remote_code, options)
    else:
        placement = _placement(config, model_config, dtype, device)
        with shards.loading():
            model, report = load_lazily(checkpoint.path, shards.tensors(placement), options)
    _check_complete(checkpoint, report)
    compute_in_served_type(model)
    return model


def _shards(
    checkpoint: Checkpoint,
    config: LoadConfig,
    model_config: PreTrainedConfig,
    device: torch.device,
) -> Shards | None:
    """Return the shards to load tensor by tensor: those that are still downloading, and any for a
    GPU. None if transformers has to load the folder, since the model's class is found there or its
    weights are no safetensors. The folder is then complete.
    """
    shards = checkpoint.shards
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    is_own = getattr(model_class, "config_class", None) is type(model_config)
    if config.trust_remote_code or not is_own:
        if shards is not None:
            with shards.loading():
                pass
        return None
    if shards is None and device.type == "cuda":
        return Shards.in_folder(checkpoint.path)
    return shards


def _served_type(
    config: LoadConfig,
    model_config: PreTrainedConfig,
    path: Path,
    shards: Shards | None,
    device: torch.device,
) -> torch.dtype:
    """Return the type to serve the model in, and log it if that is not the checkpoint's own."""
    chosen_here = config.dtype is None and device.type == "cuda"
    own = own_type(model_config)
    if own is None and chosen_here:
        shards = shards or Shards.in_folder(path)
        own = None if shards is None else shards.dtype()
    served = served_type(config.dtype, own, device)
    if chosen_here and own is None:
        logger.info(
            "the type of the weights of %s is told by no file: they are served in %s. --dtype "
            "(DTYPE) chooses another",
            config.model_id,
            str(served).removeprefix("torch."),
        )
    elif chosen_here and served is not own:
        logger.info(
            "the weights of %s are float32 and are served in %s: half the memory, and several "
            "times as fast. --dtype float32 (DTYPE) keeps them as they are",
            config.model_id,
            str(served).removeprefix("torch."),
        )
    return served


def _placement(
    config: LoadConfig, model_config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> Placement | None:
    """Return where tensors go as they are read, None for the host. Quantised ones, which are not
    merged, go to places of their own.
    """
    if device.type == "cpu":
        return None
    is_quantised = config.quantize is not None or quantization_of(model_config) is not None
    layout = None if is_quantised else layout_of(model_config, dtype)
    return Placement(layout, device, Uploads(partial(CudaCopies, device)))


def _check_complete(checkpoint: Checkpoint, report: dict[str, Any]) -> None:
    """Raise LoadError if the checkpoint lacks weights: the model would compute with random ones."""
    where = f"{checkpoint.model_id} cannot be loaded: the weights in {checkpoint.path}"
    for name, has, needs in sorted(report["mismatched_keys"]):
        raise LoadError(
            f"{where} do not fit its config.json: {name} is {list(has)} and not {list(needs)}"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise LoadError(f"{where} lack {len(missing)} tensors of the model, such as {missing[0]}")


def _load_whole(
    path: Path, trust_remote_code: bool, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load weights that are all there, with transformers' report of it."""
    untyped: Any = AutoModelForCausalLM
    model, report = untyped.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    return model, report


def load_lazily(
    path: Path, tensors: Mapping[str, LazyTensor], options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model of transformers' own class from these tensors, with transformers' report of it.

    The rest of the model's files is in the folder `path`.
    """
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(options["config"])]
    model, report = model_class.from_pretrained(None, state_dict=tensors, **options)
    with suppress(OSError):  # not every folder has a generation config
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model, report


def _scale_rotary(config: PreTrainedConfig, rope_type: RopeScaling, factor: float) -> None:
    """Replace the rotary scaling of the checkpoint, if any, and keep its base frequency."""

    def scaled(own: dict[str, Any]) -> dict[str, Any]:
        kept = {name: own[name] for name in ("rope_theta", "partial_rotary_factor") if name in own}
        return kept | {"rope_type": rope_type, "factor": factor}

    text_config = config.get_text_config(decoder=True)
    own = getattr(text_config, "rope_parameters", None)
    if not own:
        raise LoadError("the model has no rotary positions: leave out --rope-scaling and -factor")
    by_layer = all(isinstance(value, dict) for value in own.values())
    text_config.rope_parameters = (
        {layer: scaled(value) for layer, value in own.items()} if by_layer else scaled(own)
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _eos_token_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the generation config's list, or else the tokenizer's id, as TGI does."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    if isinstance(configured, list):
        return frozenset(configured)
    single = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else configured
    return frozenset() if single is None else frozenset([single])
