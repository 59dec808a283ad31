"""The noise is a function of (seed, position, token id), and it is Gumbel noise.

The statistics are of fixed seeds, so each test passes always or never. A threshold of
`_Z` standard deviations is what one fair draw in 15,000 exceeds.
"""

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.sampling import gumbel_noise, noise_keys

_Z = 4.0
_ODD_SEEDS = [0, 1, 2, 1234, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1]
_EULER = 0.5772156649015329
_TAILS = [0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]

u64 = st.integers(0, 2**64 - 1)


def keys(seeds: Iterable[int], positions: Iterable[int]) -> Tensor:
    seeds, positions = np.array(list(seeds), dtype=np.uint64), np.array(list(positions))
    return torch.from_numpy(noise_keys(seeds, positions))


def noise(seed: int, positions: range, vocab_size: int) -> Tensor:
    """Return the noise of one seed, [positions, vocab_size] float64."""
    return gumbel_noise(keys([seed] * len(positions), positions), vocab_size).double()


def uniform(gumbel: Tensor) -> Tensor:
    """Apply the Gumbel distribution function: the result is uniform if `gumbel` is Gumbel."""
    return torch.exp(-torch.exp(-gumbel.double()))


def check_chi_square(observed: Tensor, expected: Tensor) -> None:
    """Check that counts are neither too far from the expectation nor too close to it.

    The statistic is made normal by Wilson and Hilferty (1931). Classes that are too rare for it
    are counted with the rarest of the others.
    """
    found, wanted = (np.array(x.tolist()).ravel() for x in (observed, expected))
    rare = wanted < 8
    rarest = np.where(rare, np.inf, wanted).argmin()
    for counts in (found, wanted):
        counts[rarest] += counts[rare].sum()
    found, wanted = found[~rare], wanted[~rare]
    df = len(found) - 1
    statistic = ((found - wanted) ** 2 / wanted).sum()
    z = ((statistic / df) ** (1 / 3) - 1 + 2 / (9 * df)) / math.sqrt(2 / (9 * df))
    assert abs(z) < _Z, f"chi-square {statistic:.1f} at {df} degrees of freedom"


def check_independent(a: Tensor, b: Tensor, num_bins: int = 16) -> None:
    """Check that all pairs of bins of the two are equally frequent."""
    bins_a, bins_b = ((uniform(x).ravel() * num_bins).long() for x in (a, b))
    counts = torch.bincount(bins_a * num_bins + bins_b, minlength=num_bins**2)
    check_chi_square(counts, torch.full_like(counts, len(bins_a) / num_bins**2, dtype=torch.double))


# -- a function of seed, position and token id ----------------------------------------


def test_keys_are_two_words_per_row() -> None:
    made = noise_keys(np.array([3, 4], dtype=np.uint64), np.array([0, 1]))
    assert made.shape == (2, 2)
    assert made.dtype == np.int32


def test_keys_are_distinct_for_all_seeds_and_positions() -> None:
    seeds = [*range(500), *_ODD_SEEDS[3:], *(2**64 - n for n in range(2, 500))]
    grid = [(seed, position) for seed in seeds for position in range(300)]
    made = noise_keys(np.array([s for s, _ in grid], np.uint64), np.array([p for _, p in grid]))
    words = made.view(np.uint32).astype(np.uint64)
    assert len(np.unique(words[:, 0] << np.uint64(32) | words[:, 1])) == len(grid)


def test_seeds_that_agree_in_63_bits_or_in_either_half_differ() -> None:
    related = [7, 7 + 2**63, 7 + 2**32, 7 << 32, (7 << 32) + 7, 2**64 - 7]
    rows = gumbel_noise(keys(related, [11] * len(related)), 64)
    for i in range(len(related)):
        for j in range(i):
            assert (rows[i] != rows[j]).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(u64, st.integers(0, 2**20)), min_size=1, max_size=8), st.data())
def test_noise_does_not_depend_on_the_other_rows(
    rows: list[tuple[int, int]], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    seeds, positions = zip(*rows, strict=True)
    together = gumbel_noise(keys(seeds, positions), 777)
    shuffled = gumbel_noise(keys([seeds[i] for i in order], [positions[i] for i in order]), 777)
    assert torch.equal(together[list(order)], shuffled)
    for i, (seed, position) in enumerate(rows):
        assert torch.equal(together[i], gumbel_noise(keys([seed], [position]), 777)[0])


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 31, 257, 1000])
def test_noise_of_a_token_does_not_depend_on_the_vocabulary(num_tokens: int) -> None:
    key = keys([5, 2**63 + 9], [0, 4095])
    assert torch.equal(gumbel_noise(key, num_tokens), gumbel_noise(key, 4099)[:, :num_tokens])


def test_noise_does_not_change_the_keys() -> None:
    key = keys([1, 2], [3, 4])
    before = key.clone()
    gumbel_noise(key, 100)
    assert torch.equal(key, before)


# -- the distribution -----------------------------------------------------------------


@pytest.fixture(scope="module")
def census() -> dict[str, Tensor]:
    """Count 2^25 noises once for several tests: 8,192 rows of 4,096 tokens, of many seeds."""
    lower = torch.tensor([-math.log(-math.log(p)) for p in _TAILS])
    upper = torch.tensor([-math.log(-math.log1p(-p)) for p in _TAILS])
    below, above = torch.zeros(len(_TAILS)), torch.zeros(len(_TAILS))
    winners, highest = [], []
    for seed in range(8):
        drawn = gumbel_noise(keys([seed + 2**63] * 1024, range(seed, seed + 1024)), 4096)
        below += torch.stack([(drawn < x).sum() for x in lower])
        above += torch.stack([(drawn > x).sum() for x in upper])
        winners.append(drawn.argmax(dim=-1))
        highest.append(drawn[drawn > upper[4]])
    return {
        "below": below,
        "above": above,
        "winners": torch.cat(winners),
        "highest": torch.cat(highest),
    }


@pytest.mark.slow
@pytest.mark.parametrize("side", ["below", "above"])
def test_tails_are_right_out_to_one_in_a_million(census: dict[str, Tensor], side: str) -> None:
    for p, count in zip(_TAILS, census[side].tolist(), strict=True):
        mean = 2**25 * p
        # Near u = 1 float32 has steps of 2^-24, which round a tail's border.
        border = 2**25 * 2**-24 if side == "below" else 0
        assert abs(count - mean) < _Z * math.sqrt(mean) + border, (p, count, mean)


@pytest.mark.slow
def test_the_highest_noises_hardly_ever_tie(census: dict[str, Tensor]) -> None:
    """The 335 noises above the 1e-5 quantile decide draws; 23 bits would leave 84 values."""
    highest = census["highest"]
    assert highest.isfinite().all()
    assert len(highest.unique()) > 0.97 * len(highest)


@pytest.mark.slow
def test_no_token_id_is_favoured(census: dict[str, Tensor]) -> None:
    counts = torch.bincount(census["winners"] // 64, minlength=64)
    check_chi_square(counts, torch.full((64,), 8192 / 64))
    low_bits = torch.bincount(census["winners"] % 64, minlength=64)
    check_chi_square(low_bits, torch.full((64,), 8192 / 64))


def test_extremes_are_finite_and_never_nan() -> None:
    drawn = gumbel_noise(keys(_ODD_SEEDS, range(len(_ODD_SEEDS))), 200_000)
    assert drawn.isfinite().all()
    assert drawn.min() > -3.0  # float32 ends at u = 1 - 2^-24
    assert 10 < drawn.max() < 22.3  # and 31 bits at u = 2^-32


@pytest.mark.parametrize("seed", [0, 1, 42, 2**63 + 12345, 2**64 - 1])
def test_noise_is_standard_gumbel(seed: int) -> None:
    """The test is Kolmogorov and Smirnov's, along the positions and along the token ids."""
    for drawn in (noise(seed, range(2**16), 4), noise(seed, range(4), 2**16)):
        sample = uniform(drawn).ravel().sort().values
        n = len(sample)
        steps = torch.arange(n + 1, dtype=torch.double) / n
        distance = max((steps[1:] - sample).max(), (sample - steps[:-1]).max())
        assert float(distance) * math.sqrt(n) < 2.2  # p = 1.2e-4


def test_noise_has_the_mean_and_variance_of_gumbel() -> None:
    drawn = noise(99, range(512), 2048).ravel()
    root = math.sqrt(len(drawn))
    variance = math.pi**2 / 6
    assert abs(float(drawn.mean()) - _EULER) < _Z * math.sqrt(variance) / root
    assert abs(float(drawn.var()) - variance) < _Z * math.sqrt(4.4) * variance / root
    skew = float(((drawn - _EULER) ** 3).mean()) / variance**1.5
    assert abs(skew - 1.1395470994) < 0.03


@pytest.mark.parametrize("seed", [0, 7, 2**63, 2**64 - 1])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax(seed: int, temperature: float) -> None:
    scores = torch.linspace(2.5, -2.5, 24).double() / temperature
    num_draws = 60_000
    drawn = (scores + noise(seed, range(num_draws), len(scores))).argmax(dim=-1)
    check_chi_square(torch.bincount(drawn, minlength=24), scores.softmax(dim=-1) * num_draws)


def test_one_draw_of_many_seeds_follows_the_softmax() -> None:
    """The seeds are 0, 1, 2, ..., as a client would count them, all at the same position."""
    scores = torch.tensor([1.0, 0.0, -1.0, 0.5, 0.5, 2.0])
    seeds = range(60_000)
    drawn = (scores + gumbel_noise(keys(seeds, [17] * len(seeds)), 6)).argmax(dim=-1)
    check_chi_square(torch.bincount(drawn, minlength=6), scores.double().softmax(-1) * len(seeds))


# -- independence ---------------------------------------------------------------------


@pytest.mark.parametrize("distance", [1, 2, 16, 1024])
def test_positions_are_independent(distance: int) -> None:
    drawn = noise(3, range(2048 + distance), 128)
    check_independent(drawn[:-distance], drawn[distance:])


@pytest.mark.parametrize("distance", [1, 2, 2**16, 2**32, 2**33, 2**63])
def test_seeds_are_independent(distance: int) -> None:
    seeds = range(1000, 3048)
    a = gumbel_noise(keys(seeds, [9] * 2048), 128)
    b = gumbel_noise(keys([s + distance for s in seeds], [9] * 2048), 128)
    check_independent(a, b)


@pytest.mark.parametrize("distance", [1, 2, 3, 64, 1 << 12, 1 << 16])
def test_token_ids_are_independent(distance: int) -> None:
    drawn = noise(2**63 + 3, range(4), (1 << 16) + distance)
    check_independent(drawn[:, :-distance], drawn[:, distance:])


def test_seed_plus_one_is_not_position_plus_one() -> None:
    seeds = range(2048)
    a = gumbel_noise(keys([s + 1 for s in seeds], [50] * 2048), 128)
    b = gumbel_noise(keys(seeds, [51] * 2048), 128)
    check_independent(a, b)


def test_swapping_seed_and_position_gives_other_noise() -> None:
    small = range(2048)
    a = gumbel_noise(keys(small, [50] * 2048), 128)
    b = gumbel_noise(keys([50] * 2048, small), 128)
    check_independent(a[:50], b[:50])
    check_independent(a[51:], b[51:])


def test_no_row_is_a_shifted_copy_of_another() -> None:
    """Keys whose first words are close start the hash at overlapping counters."""
    base = keys([77], [5])
    near = base.repeat(64, 1) + torch.stack([torch.arange(1, 65), torch.arange(64) * 977 + 1], 1)
    rows = gumbel_noise(torch.cat([base, near.int()]), 4096 + 64)
    for shift in range(1, 65):
        check_independent(rows[0, shift:], rows[shift, :-shift], num_bins=8)


def test_both_words_of_a_key_matter() -> None:
    """The noise depends on more than their sum or their difference."""
    base = keys([78], [6])
    words = [(0, 0), (5, 0), (0, 5), (5, 5), (5, -5), (1 << 20, 0), (0, 1 << 20)]
    rows = gumbel_noise(base + torch.tensor(words, dtype=torch.int32), 8192)
    for i in range(len(words)):
        for j in range(i):
            check_independent(rows[i], rows[j])


def test_seeds_apart_by_the_step_of_splitmix_are_unrelated() -> None:
    """Without mixing, such seeds would give the same stream one position later."""
    step = 0x9E3779B97F4A7C15
    a = gumbel_noise(keys([100 + step] * 64, range(64)), 1024)
    b = gumbel_noise(keys([100] * 65, range(65)), 1024)
    check_independent(a, b[1:])
    check_independent(a, b[:-1])


def test_consecutive_draws_are_independent() -> None:
    """The test counts pairs of a token and the next, drawn from a skewed distribution."""
    scores = torch.tensor([1.5, 0.0, 0.7, -0.4, 0.2])
    drawn = (scores + noise(123456789, range(80_001), 5)).argmax(dim=-1)
    p = scores.double().softmax(-1)
    pairs = torch.bincount(drawn[:-1] * 5 + drawn[1:], minlength=25)
    check_chi_square(pairs, torch.outer(p, p) * 80_000)
