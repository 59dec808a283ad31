"""The scores of forbidden tokens become -inf, and nothing else changes."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels.token_mask import mask_tokens_torch, mask_tokens_triton
from tests.kernels.rounding import DEVICE

MaskTokens = Callable[[Tensor, Tensor, Tensor], None]
each_implementation = pytest.mark.parametrize(
    "mask_tokens", [mask_tokens_torch, mask_tokens_triton]
)
VOCAB_SIZES = [1, 31, 32, 33, 258, 1023, 1024, 1025, 3000]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with DEVICE:
        torch.manual_seed(0)
        yield


def masks_of(allowed: Tensor) -> Tensor:
    """Pack [rows, vocab_size] bool in int32 words; bits past the vocabulary are set."""
    rows, vocab_size = allowed.shape
    num_words = -(-vocab_size // 32)
    padded = torch.ones(rows, num_words * 32, dtype=torch.bool)
    padded[:, :vocab_size] = allowed
    words = (padded.view(rows, num_words, 32).long() << torch.arange(32)).sum(-1)
    return words.to(torch.uint32).view(torch.int32)


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_scores_of_forbidden_tokens_become_minus_infinity(
    mask_tokens: MaskTokens, dtype: torch.dtype, vocab_size: int
) -> None:
    logits = torch.randn(5, vocab_size).to(dtype)
    rows = torch.tensor([3, 0, 4])
    allowed = torch.rand(3, vocab_size) < 0.5
    expected = logits.clone()
    for row, allows in zip(rows.tolist(), allowed, strict=True):
        expected[row, ~allows] = -torch.inf
    mask_tokens(logits, rows, masks_of(allowed))
    assert torch.equal(logits, expected)


@each_implementation
@pytest.mark.parametrize("allowed", [True, False])
def test_everything_or_nothing_may_be_allowed(mask_tokens: MaskTokens, allowed: bool) -> None:
    logits = torch.randn(2, 100)
    expected = logits.clone() if allowed else torch.full_like(logits, -torch.inf)
    mask_tokens(logits, torch.arange(2), masks_of(torch.full((2, 100), allowed)))
    assert torch.equal(logits, expected)


@each_implementation
@pytest.mark.parametrize("bit", [0, 1, 30, 31, 32, 63])
def test_each_bit_is_its_own_token(mask_tokens: MaskTokens, bit: int) -> None:
    """The 32nd bit of a word is its sign."""
    allowed = torch.zeros(1, 64, dtype=torch.bool)
    allowed[0, bit] = True
    logits = torch.zeros(1, 64)
    mask_tokens(logits, torch.tensor([0]), masks_of(allowed))
    assert (logits[0] == 0).nonzero().tolist() == [[bit]]


@each_implementation
def test_nan_scores_of_allowed_tokens_stay(mask_tokens: MaskTokens) -> None:
    special = [torch.inf, -torch.inf, torch.nan, -0.0]
    logits = torch.tensor([special * 2])
    allowed = torch.tensor([[True] * 4 + [False] * 4])
    mask_tokens(logits, torch.tensor([0]), masks_of(allowed))
    expected = torch.tensor([special + [-torch.inf] * 4])
    assert torch.equal(logits.nan_to_num(7.0), expected.nan_to_num(7.0))


@each_implementation
def test_rows_may_be_parts_of_a_wider_tensor(mask_tokens: MaskTokens) -> None:
    wide = torch.randn(4, 1300)
    before = wide.clone()
    allowed = torch.rand(2, 1200) < 0.5
    mask_tokens(wide[:, :1200], torch.tensor([2, 1]), masks_of(allowed))
    assert torch.equal(wide[:, 1200:], before[:, 1200:])
    assert torch.equal(wide[[0, 3]], before[[0, 3]])
    assert torch.equal(wide[[2, 1], :1200].isinf(), ~allowed)
