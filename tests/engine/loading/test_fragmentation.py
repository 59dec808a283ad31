"""Loading and merging leave next to no memory that is reserved and not used.

No GPU is needed: a model of the real shape is loaded and merged on the meta device, and what this
asks of the allocator is recorded and done again by a model of torch's allocator.
"""

import random
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from bench.gpu.models import CONFIGS
from engine.device.upload import Uploads
from engine.fusion.find import ForwardTrace, _merge_linears
from engine.loading.lazy_shards import LazyTensor
from engine.loading.loader import load_lazily
from engine.loading.placement import Placement, layout_of
from engine.loading.tensor_file import StoredTensor
from tests.engine.loading.caching_allocator import CachingAllocator, Event, Recorder

META = torch.device("meta")
WARM_UP = -1
"""transformers allocates and frees a block of all weights' size before it loads them."""


class NoCopies:
    """Stands for copies to the device, which allocate nothing."""

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def begin(self) -> None: ...

    def start(self, source: Tensor, target: Tensor) -> "NoCopies":
        assert source.shape == target.shape
        return self

    def end(self) -> None: ...

    def wait(self) -> None: ...


@dataclass
class FileOfNothing:
    """Has the place of a file whose values do not matter."""

    tensors: dict[str, StoredTensor]

    @property
    def file(self) -> "FileOfNothing":
        return self

    def read(self, buffer: Tensor, position: int) -> None: ...


@dataclass
class Recorded:
    """A tensor of a checkpoint. Recording begins when the first one is read: until then, the model
    is made on the meta device, which is no memory of a GPU.
    """

    recording: ExitStack
    recorder: Recorder
    tensor: LazyTensor

    def __getitem__(self, index: Any) -> Tensor:
        if not self.recorder.is_on:
            self.recording.enter_context(self.recorder)
        return self.tensor[index]


def load(config: PreTrainedConfig, placed: bool, recorder: Recorder) -> PreTrainedModel:
    """Load a model as for a GPU. If not `placed`, each tensor gets a place of its own."""
    layout = layout_of(config, torch.bfloat16)
    stored = revert_weight_conversion(layout, layout.state_dict())  # as checkpoints have it
    file: Any = FileOfNothing(
        {
            name: StoredTensor(tensor.dtype, tuple(tensor.shape), 0)
            for name, tensor in stored.items()
        }
    )
    placement = Placement(layout if placed else None, META, Uploads(NoCopies, 1 << 30))
    options: dict[str, Any] = {"config": config, "dtype": torch.bfloat16, "device_map": {"": META}}
    options["output_loading_info"] = True
    with ExitStack() as recording:
        tensors: Any = {
            name: Recorded(recording, recorder, LazyTensor(name, file, placement))
            for name in file.tensors
        }
        return load_lazily(Path("/nowhere"), tensors, options)[0]


def merge(model: PreTrainedModel, recorder: Recorder) -> int:
    """Merge the linears of one input, as the engine does. Return how many groups there were."""
    trace = ForwardTrace()
    linears = [module for module in model.modules() if type(module) is torch.nn.Linear]
    hooks = [
        linear.register_forward_pre_hook(lambda module, args: trace.inputs.append((module, *args)))
        for linear in linears
    ]
    ids = torch.zeros(1, 4, dtype=torch.int64, device=META)
    mask = torch.zeros(1, 1, 4, 4, device=META)  # without one, transformers looks at values
    model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    with recorder:
        return _merge_linears(model, trace).count


def record(
    name: str, placed: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Event], list[Event], int]:
    """Return what load and merge ask for, and the bytes of the weights."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a recorder sees its own thread only
    config_class, options = CONFIGS[name]
    # Modules are made with placeholders in float32, which take no memory of a GPU.
    recorder = Recorder(torch.bfloat16)
    with torch.inference_mode():
        model = load(config_class(**options), placed, recorder)
        num_loaded = len(recorder.events)
        groups = merge(model, recorder)
        recorder.note_freed()
    assert groups >= model.config.num_hidden_layers
    events = recorder.events
    return events[:num_loaded], events[num_loaded:], model.get_memory_footprint()


def in_threads(events: list[Event], seed: int) -> list[Event]:
    """Return events that only allocate in an order that four threads might give them."""
    rng, waiting, shuffled = random.Random(seed), list(events), list[Event]()
    while waiting:
        shuffled.append(waiting.pop(rng.randrange(min(4, len(waiting)))))
    return shuffled


def lost(loads: list[Event], merges: list[Event], weights: int, expandable: bool) -> float:
    """Return what stays reserved and is not allocated, as a share of the weights."""
    allocator = CachingAllocator(expandable)
    allocator.run([(WARM_UP, weights), (WARM_UP, None), *loads, *merges])
    allocator.empty_cache()
    assert 0.999 < allocator.allocated / weights < 1.001
    return (allocator.reserved - allocator.allocated) / weights


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen3-8B", "Gemma-2-9B"])
def test_less_than_three_hundredths_of_the_weights_are_lost(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, merges, weights = record(name, True, monkeypatch)
    assert merges == []
    assert all(size is not None for _, size in loads)
    for seed in range(5):
        for expandable in (True, False):
            assert lost(in_threads(loads, seed), merges, weights, expandable) < 0.03


def test_hardly_more_is_lost_where_experts_are_stacked_while_they_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is freed then are large holes, whose pages can be given back."""
    loads, merges, weights = record("Mixtral-8x7B-8-layers", True, monkeypatch)
    assert lost(loads, merges, weights, expandable=True) < 0.03
    assert lost(loads, merges, weights, expandable=False) > 0.1


def test_merging_weights_that_lie_anywhere_would_lose_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This is what the places are for. Pages that can be given back make it less."""
    loads, merges, weights = record("Llama-3.1-8B", False, monkeypatch)
    for seed in range(5):
        shuffled = in_threads(loads, seed)
        assert lost(shuffled, merges, weights, expandable=False) > 0.1
        assert 0.03 < lost(shuffled, merges, weights, expandable=True) < 0.1
