"""With linears of one tiling, a request's logits do not depend on the requests beside it."""

import pytest
import torch
from torch import Tensor, nn

from engine.core.config import EngineConfig
from engine.core.errors import LoadError
from engine.core.request import Request, SamplingParams, StoppingParams
from engine.engine import Engine
from engine.linear.int8 import Int8Linear
from engine.linear.invariant import InvariantLinear, collecting_products, make_invariant
from kernels.invariant_linear import invariant_linear_torch
from kernels.ops import TORCH, TRITON
from tests.engine.driving import run
from tests.engine.models import prepared


def sampled(name: str, prompt: bytes, seed: int) -> Request:
    sampling = SamplingParams(do_sample=True, seed=seed, logprobs=True)
    return Request(name, list(prompt), sampling, StoppingParams(4, ignore_eos=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_request_has_the_same_logprobs_to_the_bit_alone_and_in_company(name: str) -> None:
    loaded = prepared(name, TRITON, dtype=torch.bfloat16, batch_invariant=True, num_hidden_layers=1)
    config = EngineConfig(max_sequences=8, max_batch_tokens=64, num_blocks=64, prefix_caching=False)
    texts = (b"once upon a time", b"a", b"the quick brown fox jumps over the dog", b"say it")
    requests = [sampled(f"{i}", text, seed=i) for i, text in enumerate(texts)]
    together = run(Engine(loaded, config), [(0, request) for request in requests])
    for request in requests:
        alone = run(Engine(loaded, config), [(0, request)])
        assert alone.ids(request) == together.ids(request)
        assert alone.logprobs(request) == together.logprobs(request)


@pytest.mark.slow
def test_a_prompt_has_the_same_logprobs_however_it_is_cut_into_chunks() -> None:
    loaded = prepared(
        "llama", TRITON, dtype=torch.bfloat16, batch_invariant=True, num_hidden_layers=1
    )
    request = sampled("long", b"the quick brown fox jumps over the lazy dog", seed=1)
    answers = []
    for budget in (64, 16, 9):
        config = EngineConfig(max_sequences=2, max_batch_tokens=budget, num_blocks=64)
        answers.append(run(Engine(loaded, config), [(0, request)]).logprobs(request))
    assert answers[0] == answers[1] == answers[2]


def test_every_linear_is_replaced_and_keeps_its_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.Linear(4, 6, bias=False)))
    x, weight = torch.randn(3, 8), model[0].weight
    expected = model(x)
    make_invariant(model, invariant_linear_torch)
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert isinstance(model[0], InvariantLinear)
    assert model[0].weight is weight
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("inference", [False, True])
def test_products_are_found_whichever_way_they_are_called(inference: bool) -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    calls = {
        lambda: x @ weight.T,
        lambda: nn.functional.linear(x, weight),
        lambda: nn.functional.linear(x, weight, torch.randn(5)),
        lambda: torch.addmm(torch.randn(5), x, weight.T),
        lambda: torch.bmm(x[None], weight.T[None]),
        lambda: torch.einsum("ij,kj->ik", x, weight),
    }
    for call in calls:
        with torch.inference_mode(inference), collecting_products() as products:
            call()
        assert products


def test_an_outer_product_is_no_sum() -> None:
    with collecting_products() as products:
        torch.randn(1, 4, 1) @ torch.randn(1, 1, 7)
    assert not products


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [("mixtral", "no mixtures of experts"), ("gpt2", "products outside of its linears")],
)
def test_a_model_with_other_products_is_refused(name: str, reason: str) -> None:
    with pytest.raises(LoadError, match=reason):
        prepared(name, TRITON, batch_invariant=True, num_hidden_layers=1)


def test_linears_of_another_kind_are_refused() -> None:
    quantised = Int8Linear(torch.zeros(4, 8, dtype=torch.int8), torch.ones(4), None)
    with pytest.raises(LoadError, match="cannot compute a Int8Linear"):
        make_invariant(nn.Sequential(quantised), invariant_linear_torch)


def test_a_device_on_which_rows_differ_after_all_is_refused() -> None:
    def by_number(x: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
        return x @ weight.T * (1 + 1e-6 * len(x))

    with pytest.raises(LoadError, match="cannot be had on this GPU"):
        make_invariant(nn.Sequential(nn.Linear(8, 4)), by_number)


def test_a_cpu_has_no_such_linears() -> None:
    with pytest.raises(LoadError, match="--batch-invariant needs a GPU"):
        prepared("llama", TORCH, batch_invariant=True, num_hidden_layers=1)
