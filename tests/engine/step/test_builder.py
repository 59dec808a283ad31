"""A step is plain data, and has all that changed: one that was pickled runs to the same result."""

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.attention.kv_cache import AttentionCall
from engine.attention.plan import TritonPlanner
from engine.core.config import BLOCK_SIZE, EngineConfig
from engine.core.request import Finished, Request, SamplingParams, StoppingParams
from engine.core.scheduler import Batch, ScheduledSequence
from engine.core.sequence import Sequence
from engine.engine import Engine
from engine.sampling.factory import make_sampler
from engine.step.builder import HostStep, StepBuilder
from engine.step.graphs import shapes_for
from kernels.ops import TORCH, TRITON, Ops
from kernels.paged_attention.mask import MaskSpec
from tests.engine.driving import Answers, run
from tests.engine.models import VOCAB_SIZE, prepared
from tests.engine.recording import capture, recorded

SAMPLING = [
    SamplingParams(logprobs=True),
    SamplingParams(do_sample=True, temperature=0.8, seed=7, watermark=True, logprobs=True),
    SamplingParams(do_sample=True, top_k=9, top_p=0.9, typical_p=0.9, seed=8, top_n_tokens=3),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, logprobs=True),
    SamplingParams(presence_penalty=1.5, do_sample=True, seed=9, logprobs=True),
    SamplingParams(
        output_frequency_penalty=1.5,
        repetition_penalty=1.2,
        logit_bias=((7, 2.0), (30, -4.5)),
        raw_logprobs=True,
        logprobs=True,
        top_n_tokens=2,
    ),
]


class _HostPickler(pickle.Pickler):
    """Refuses tensors, which may be on a device."""

    def reducer_override(self, obj: object) -> Any:
        assert not isinstance(obj, Tensor)
        return NotImplemented


def pickled(step: HostStep) -> HostStep:
    file = io.BytesIO()
    _HostPickler(file).dump(step)
    copy = pickle.loads(file.getvalue())
    assert isinstance(copy, HostStep)
    return copy


class _PicklingEngine(Engine):
    """An engine whose every step is pickled, and loaded again, before it is launched."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.num_pickled = 0
        build = self._builder.build

        def build_and_pickle(batch: Batch) -> HostStep:
            self.num_pickled += 1
            return pickled(build(batch))

        self._builder.build = build_and_pickle  # type: ignore[method-assign]


def requests() -> list[list[Request]]:
    """All kinds of sampling, a fork, and logprobs of a prompt, more than memory has room for."""
    prompt, stopping = list(b"say it again, say it"), StoppingParams(6, ignore_eos=True)
    mixed = [[Request(f"{i}", prompt, p, stopping)] for i, p in enumerate(SAMPLING)]
    forked = SamplingParams(do_sample=True, seed=1)
    return [
        *mixed,
        [Request(f"fork-{i}", prompt[:7], forked, stopping) for i in range(2)],
        [
            Request(
                "prompt",
                prompt[::-1],
                SamplingParams(),
                stopping,
                prompt_logprobs=True,
                prompt_top_tokens=2,
            )
        ],
    ]


def answers(engine: Engine) -> Answers:
    return run(engine, [(i, group) for i, group in enumerate(requests())])


@pytest.mark.parametrize(
    ("ops", "with_graphs"),
    [
        pytest.param(TORCH, False, id="torch"),
        pytest.param(TRITON, False, id="triton", marks=pytest.mark.slow),
        pytest.param(recorded(TRITON), True, id="triton in graphs", marks=pytest.mark.slow),
    ],
)
def test_a_pickled_step_runs_to_the_same_result(ops: Ops, with_graphs: bool) -> None:
    loaded = prepared("llama", ops, num_hidden_layers=1)
    config = EngineConfig(max_sequences=8, max_batch_tokens=32, num_blocks=12, max_total_tokens=48)
    capturing = capture if with_graphs else None
    engine = _PicklingEngine(loaded, config, capture=capturing)
    through_pickle, directly = answers(engine), answers(Engine(loaded, config, capture=capturing))
    assert engine.num_pickled > 6
    for request in (request for group in requests() for request in group):
        last = through_pickle.last(request)
        assert isinstance(last, Finished)
        assert through_pickle.ids(request) == directly.ids(request)
        assert through_pickle.logprobs(request) == directly.logprobs(request)
        other = directly.last(request)
        assert isinstance(other, Finished)
        assert last.prompt == other.prompt
        assert last.prompt_top_tokens == other.prompt_top_tokens


# -- block tables ---------------------------------------------------------------------------


def _running(slot: int, num_known: int, block_table: list[int]) -> Sequence:
    sequence = Sequence(Request(str(slot), [1] * num_known, SamplingParams(), StoppingParams(9)))
    sequence.slot, sequence.block_table = slot, block_table
    return sequence


def _step_of(sequence: Sequence, start: int, length: int) -> Batch:
    entry = ScheduledSequence(sequence, sequence.slot, start, length, True, 0)
    return Batch(scheduled=[entry], reset=[sequence])


@pytest.mark.parametrize(
    ("num_known", "start", "apart"),
    [
        pytest.param(20, 0, False, id="a short prompt"),
        pytest.param(80 * BLOCK_SIZE, 80 * BLOCK_SIZE - 3, True, id="a long cached prefix"),
        pytest.param(10 * BLOCK_SIZE, 0, False, id="without a graph"),
        pytest.param(33, 32, False, id="a decode"),
        pytest.param(70 * BLOCK_SIZE, 70 * BLOCK_SIZE - 1, True, id="a decode of many blocks"),
    ],
)
def test_changed_block_tables_reach_the_device(num_known: int, start: int, apart: bool) -> None:
    """They ride among the step's arrays; only a graph has no room for those of a long prefix."""
    cpu, shape = torch.device("cpu"), (9, 99)
    call = AttentionCall(nn.Identity(), 4, 2, 16, 16, MaskSpec())
    planner = TritonPlanner([call], shape, 64, cpu, False)
    sampler = make_sampler(TRITON, 8, VOCAB_SIZE, cpu, 5)
    builder = StepBuilder(shape, sampler, planner, shapes_for(8, 64))
    rng = np.random.default_rng(0)
    for slot in (3, 0, 3, 7):
        table = rng.permutation(99)[: -(-num_known // BLOCK_SIZE)].tolist()
        step = builder.build(_step_of(_running(slot, num_known, table), start, num_known - start))
        assert (step.update is not None) == apart
        if step.update is not None:
            planner.apply_update(step.update.upload(cpu))
        buffer = torch.zeros(step.arrays.max_bytes, dtype=torch.uint8)
        step.arrays.copy_to(buffer)
        planner.apply_update(step.arrays.unpack(buffer))
        assert planner._block_tables.tolist() == builder._block_tables.tolist()
        assert planner._block_tables[slot, : len(table)].tolist() == table
