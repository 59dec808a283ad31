"""Sampling on the device: every kind is compiled and captured ahead, and rows come out the same."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from triton import knobs

from engine.core.config import EngineConfig
from engine.core.request import Failed, Request, SamplingParams, StoppingParams
from engine.engine import Engine
from kernels.fused_sampling import launch
from kernels.sampling import ROW_PARAMETERS, noise_keys
from tests.engine.driving import run
from tests.engine.models import prepared
from tests.engine.sampling.test_slots import USED
from tests.gpu.test_engine import WIDE, eager_capture

CUDA = torch.device("cuda")
STOPPING = StoppingParams(4, ignore_eos=True)


def requests() -> list[Request]:
    """Return one request with each parameter alone, one with each beside sampling, and with all."""
    every = {name: value for name, value in USED.items() if name != "output_frequency_penalty"}
    kinds = [SamplingParams(**{name: value, "logprobs": True}) for name, value in USED.items()]
    kinds += [SamplingParams(**{name: value, "do_sample": True}) for name, value in USED.items()]
    kinds += [SamplingParams(), SamplingParams(**every)]
    prompt = list(b"again and again")
    asked = [Request(f"{i}", prompt, kind, STOPPING) for i, kind in enumerate(kinds)]
    options: dict[str, Any] = {"prompt_logprobs": True, "prompt_top_tokens": 3}
    return [*asked, Request("prompt", prompt, SamplingParams(), STOPPING, **options)]


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Return the names of the kernels that are compiled from now on."""
    names: list[str] = []

    def listen(src: Any, **_: object) -> None:
        names.append(src.name)

    before, knobs.compilation.listener = knobs.compilation.listener, listen
    yield names
    knobs.compilation.listener = before


def ready(capture: Any = None) -> Engine:
    config = EngineConfig(max_sequences=16, max_batch_tokens=64, num_blocks=256)
    model = prepared("llama", device="cuda", dtype=torch.bfloat16, **WIDE)
    engine = Engine(model, config, capture=capture)
    engine.warm_up()
    while engine.capture_next_graph():
        pass
    return engine


def test_no_kind_of_sampling_compiles_a_kernel_once_the_engine_is_ready(
    compiled: list[str],
) -> None:
    engine = ready()
    compiled.clear()
    for request in requests():
        assert not isinstance(run(engine, [(0, request)]).last(request), Failed)
    assert compiled == []


def test_captured_sampling_gives_what_runs_kernel_by_kernel() -> None:
    asked = requests()
    arrivals = [(i, request) for i, request in enumerate(asked)]
    replayed, eager = run(ready(), arrivals), run(ready(eager_capture), arrivals)
    for request in asked:
        assert replayed.ids(request) == eager.ids(request)
        assert replayed.logprobs(request) == eager.logprobs(request)


def parameters(rows: int) -> np.ndarray:
    neutral = {"temperature": 1, "top_p": 1, "typical_p": 1, "repetition_penalty": 1}
    words = np.zeros(rows, ROW_PARAMETERS)
    for name, value in {**neutral, "top_n_tokens": 1, "do_sample": 1}.items():
        words[name] = value
    rng = np.random.default_rng(rows)
    words["temperature"] = rng.choice([0.6, 1.0, 1.5], rows)
    words["top_k"] = rng.choice([0, 20, 50, 1000, 5000], rows)
    words["top_p"] = rng.choice([1.0, 0.95, 0.8], rows)
    words["typical_p"] = rng.choice([1.0, 1.0, 0.9], rows)
    words["noise_key"] = noise_keys(np.arange(rows, dtype=np.uint64), np.arange(rows))
    return words


@pytest.mark.parametrize("spread", [1.0, 4.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("rows", [1, 64, 256])
@pytest.mark.parametrize("vocab_size", [49_152, 128_256, 256_000])
def test_rows_come_out_the_same_however_few_candidates_are_held(
    vocab_size: int, rows: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    logits = (spread * torch.randn(rows, vocab_size, device=CUDA)).bfloat16()
    words = torch.from_numpy(parameters(rows).view(np.int32).reshape(rows, -1)).to(CUDA)
    counts = torch.zeros(1, vocab_size, dtype=torch.int32, device=CUDA)
    results = []
    for held in (launch.HELD, 16):
        monkeypatch.setattr(launch, "HELD", held)
        results.append(launch.sample(logits, words, counts, 36))
    for one, other in zip(*results, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
