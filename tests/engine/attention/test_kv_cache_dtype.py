"""A KV cache in 8 bits takes a half or a quarter of the memory, for nearly the same answers."""

import pytest
import torch

from engine.attention.kv_cache import bytes_per_block
from kernels.ops import TRITON, Ops
from tests.engine.driving import greedy, make_engine, own_logprobs, run
from tests.engine.models import FUSED, prepared, reference

PROMPTS = [list(b"once upon a time there was"), list(b"the quick brown fox")]


@pytest.mark.parametrize(
    "ops", [FUSED, pytest.param(TRITON, marks=pytest.mark.slow)], ids=["torch", "triton"]
)
def test_logprobs_with_an_8_bit_cache_stay_near_the_models_own(ops: Ops) -> None:
    loaded = prepared("llama", ops, num_hidden_layers=2)
    engine = make_engine(loaded, kv_cache_dtype="fp8_e4m3fn")
    requests = [greedy(prompt, 4) for prompt in PROMPTS]
    answers = run(engine, [(i, request) for i, request in enumerate(requests)])
    model = reference("llama", num_hidden_layers=2)
    for request in requests:
        ids, logprobs = answers.ids(request), answers.logprobs(request)
        own = own_logprobs(model, request.prompt_ids, ids)[torch.arange(len(ids)), ids]
        difference = (torch.tensor(logprobs) - own).abs()
        assert 0 < difference.max() < 0.5  # 3 bits of mantissa, of logits with a spread of 5


def test_a_block_of_an_8_bit_cache_takes_one_byte_per_value() -> None:
    calls = prepared("llama", FUSED).calls
    wide, narrow = (bytes_per_block(calls, t) for t in (torch.float32, torch.float8_e4m3fn))
    assert wide == 4 * narrow
