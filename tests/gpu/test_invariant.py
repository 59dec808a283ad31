"""With linears of one tiling, bfloat16 gives the same bits in any company on this device."""

import pytest
import torch

from engine.core.config import EngineConfig
from engine.engine import Engine
from kernels.invariant_linear import invariant_linear_triton
from tests.engine.driving import run
from tests.engine.models import prepared
from tests.gpu.test_engine import WIDE, arrivals


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 6144), (14336, 4096), (2880, 1000)])
def test_a_row_is_the_same_to_the_bit_among_any_number(
    inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    with torch.device("cuda"):
        torch.manual_seed(0)
        x, weight = torch.randn(4096, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    together = invariant_linear_triton(x, weight, None)
    for num_rows in (1, 3, 16, 33, 64, 65, 200, 1000):
        some = invariant_linear_triton(x[-num_rows:], weight, None)
        assert torch.equal(some, together[-num_rows:])


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_a_request_has_the_same_logprobs_alone_and_among_others(name: str) -> None:
    loaded = prepared(name, device="cuda", dtype=torch.bfloat16, batch_invariant=True, **WIDE)
    requests = [(0, request) for _, request in arrivals(7, 30, sampled=True)]
    config = EngineConfig(  # with room for all prompts in one step
        max_sequences=64, max_batch_tokens=4096, num_blocks=2048, prefix_caching=False
    )
    together = run(Engine(loaded, config), requests)
    for _, request in requests:
        alone = run(Engine(loaded, config), [(0, request)])
        assert alone.ids(request) == together.ids(request)
        assert alone.logprobs(request) == together.logprobs(request)
