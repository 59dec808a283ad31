"""Mixtures of experts on the device: their decodes are graphs in every type."""

from itertools import product
from typing import Any

import pytest
import torch

from engine.core.config import EngineConfig
from engine.engine import Engine
from engine.experts.interface import EXPERTS_NAME
from engine.step.graphs import CudaCapture
from kernels.grouped_gemm import (
    TILINGS,
    GateForm,
    grouped_linear_torch,
    grouped_linear_triton,
    route_torch,
    route_triton,
)
from tests.engine.driving import check_greedy, run
from tests.engine.models import MIXTURES, prepared
from tests.gpu.test_engine import WIDE, arrivals, eager_capture, reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def engine(name: str, dtype: torch.dtype, capture: Any) -> Engine:
    model = prepared(name, device="cuda", dtype=dtype, **WIDE)
    assert model.model.config._experts_implementation == EXPERTS_NAME
    config = EngineConfig(max_sequences=64, max_batch_tokens=256, num_blocks=1024)
    return Engine(model, config, capture=capture)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_a_mixture_decodes_under_graphs_as_it_does_kernel_by_kernel(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    requests = arrivals(5, 30, sampled=True)
    graphs, cuda_capture = [], CudaCapture()

    def capture(work: Any) -> Any:
        graphs.append(cuda_capture(work))
        return graphs[-1]

    replayed = run(engine(name, dtype, capture), requests)
    again = run(engine(name, dtype, eager_capture), requests)
    assert graphs
    assert "kernel by kernel" not in caplog.text
    for _, request in requests:
        assert replayed.ids(request) == again.ids(request)
        assert replayed.logprobs(request) == again.logprobs(request)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_token_is_the_models_own(name: str) -> None:
    requests = arrivals(6, 10, sampled=False)
    answers = run(engine(name, torch.float32, CudaCapture()), requests)
    for _, request in requests:
        check_greedy(reference(name, torch.float32), answers, request, tolerance=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_tiling_gives_what_torch_gives(transposed: bool, dtype: torch.dtype) -> None:
    """At a size at which copies are pipelined, which an interpreter does not do."""
    with torch.device("cuda"):
        torch.manual_seed(0)
        experts = torch.rand(300, 16).topk(4).indices
        weight = torch.randn(16, 1024, 1024) / 32
        x, bias = torch.randn(300, 1024).to(dtype), torch.randn(16, 1024).to(dtype)
    forms = (None, GateForm("halves", "silu"), GateForm("interleaved", "silu", 1.0, 1.702, 1.0))
    for tiling, form in product(TILINGS, forms):
        data = x, weight.to(dtype), bias
        ours = grouped_linear_triton(*data, route_triton(experts, 16, tiling), transposed, form)
        routing = route_torch(experts, 16, tiling)
        theirs = grouped_linear_torch(*data, routing, transposed, form)
        eps = torch.finfo(dtype).eps
        assert torch.allclose(ours, theirs, rtol=4 * eps, atol=max(8 * eps, 1e-5))
