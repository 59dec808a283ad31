"""A green list is a share of the vocabulary that depends on the previous token alone."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.watermark import green_list, watermark_torch, watermark_triton
from tests.kernels.rounding import DEVICE

Watermark = Callable[[Tensor, Tensor, Tensor, float, float], None]
each_implementation = pytest.mark.parametrize("watermark", [watermark_torch, watermark_triton])
VOCAB_SIZES = [1, 31, 258, 1023, 1024, 1025, 3000]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GAMMAS = [0.0, 0.1, 0.25, 0.5, 0.9, 1.0]


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with DEVICE:
        torch.manual_seed(0)
        yield


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_only_the_scores_of_green_tokens_are_raised(
    watermark: Watermark, dtype: torch.dtype, vocab_size: int
) -> None:
    logits = torch.randn(5, vocab_size).to(dtype)
    previous = torch.randint(0, 1 << 17, (5,))
    rows = torch.tensor([4, 0, 2])
    expected = logits.clone()
    green = green_list(previous[rows], 0.5, vocab_size)
    expected[rows] = torch.where(green, logits[rows] + 2.0, logits[rows])
    watermark(logits, rows, previous, 0.5, 2.0)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("delta", [0.3, -1.7, 5.01])
@pytest.mark.slow
def test_torch_and_triton_agree_to_the_last_bit(
    dtype: torch.dtype, gamma: float, delta: float
) -> None:
    """They agree also where the addition has to be rounded."""
    logits = torch.randn(3, 2000).to(dtype)
    other, previous, rows = logits.clone(), torch.tensor([0, 49151, 256000]), torch.arange(3)
    watermark_torch(logits, rows, previous, gamma, delta)
    watermark_triton(other, rows, previous, gamma, delta)
    assert torch.equal(logits, other)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_share_of_green_tokens_is_gamma(gamma: float) -> None:
    """The share holds in each list and, for each token, over the lists: as for fair coins."""
    vocab_size, num_lists = 20_000, 200
    green = green_list(torch.arange(num_lists), gamma, vocab_size).double()
    for dim, size in ((1, vocab_size), (0, num_lists)):
        deviation = 5.5 * (gamma * (1 - gamma) / size) ** 0.5 + 1e-9
        assert (green.mean(dim) - gamma).abs().max() <= deviation


def test_two_tokens_have_unrelated_lists() -> None:
    first = green_list(torch.arange(0, 400), 0.5, 5000)
    second = green_list(torch.arange(1, 401), 0.5, 5000)
    agreement = (first == second).double().mean(1)
    assert (agreement - 0.5).abs().max() < 5.5 * 0.5 / 5000**0.5


@each_implementation
def test_a_rows_green_list_depends_on_the_previous_token_alone(watermark: Watermark) -> None:
    """It does not depend on the row, other rows, the scores, or the size of the vocabulary."""
    alone = torch.zeros(1, 600)
    watermark(alone, torch.tensor([0]), torch.tensor([17]), 0.5, 1.0)
    company = torch.randn(6, 1100).round()
    before, previous = company.clone(), torch.tensor([3, 17, 5, 17, 9, 17])
    watermark(company, torch.tensor([5, 3, 1]), previous, 0.5, 1.0)
    raised = company - before
    for row in (1, 3, 5):
        assert torch.equal(raised[row, :600], alone[0])
    assert not raised[[0, 2, 4]].any()


def test_the_green_list_of_a_larger_share_contains_that_of_a_smaller_one() -> None:
    previous = torch.arange(20)
    lists = [green_list(previous, gamma, 1000) for gamma in GAMMAS]
    for smaller, larger in pairwise(lists):
        assert (larger | ~smaller).all()


@each_implementation
def test_a_token_that_is_excluded_stays_excluded(watermark: Watermark) -> None:
    logits = torch.full((1, 300), -torch.inf)
    watermark(logits, torch.tensor([0]), torch.tensor([1]), 0.5, 2.0)
    assert (logits == -torch.inf).all()


@each_implementation
def test_rows_may_be_parts_of_a_wider_tensor(watermark: Watermark) -> None:
    wide = torch.zeros(3, 1300)
    watermark(wide[:, :1200], torch.tensor([1]), torch.tensor([5, 6, 7]), 0.5, 2.0)
    assert not wide[:, 1200:].any()
    assert torch.equal(wide[1, :1200] == 2.0, green_list(torch.tensor([6]), 0.5, 1200)[0])
