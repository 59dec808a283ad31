"""The workload: its lengths, its arrivals, and the plans that cannot be."""

from random import Random

import pytest

from bench.workload import LengthMix, LoadPlan, arrivals


def plan(**changes: object) -> LoadPlan:
    values: dict[str, object] = {
        "api": "tgi",
        "num_requests": 6,
        "input_len": LengthMix.parse("8"),
        "output_len": LengthMix.parse("4"),
    }
    if "rate" not in changes:
        values["concurrency"] = 1
    return LoadPlan(**values | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("128", ((1.0, 128, 128),)),
        ("64:256", ((1.0, 64, 256),)),
        ("0.7*32:64+0.3*512", ((0.7, 32, 64), (0.3, 512, 512))),
    ],
)
def test_length_mix_parses(text: str, ranges: tuple[tuple[float, int, int], ...]) -> None:
    assert LengthMix.parse(text).ranges == ranges


@pytest.mark.parametrize(
    "text", ["", "x", "0", "9:3", "-4", "1:2:3", "0.7*32", "0.7*32+0.7*64", "nan*3", "1.5", "8+8"]
)
def test_length_mix_error_says_what_to_write(text: str) -> None:
    with pytest.raises(ValueError, match=r"write 128, or 64:256 .* or 0\.7\*32:64\+0\.3\*512"):
        LengthMix.parse(text)


def test_length_mix_samples_every_range_by_its_weight() -> None:
    mix, rng = LengthMix.parse("0.7*1:3+0.3*512"), Random(0)
    lengths = [mix.sample(rng) for _ in range(2000)]
    assert set(lengths) == {1, 2, 3, 512}
    assert lengths.count(512) / len(lengths) == pytest.approx(0.3, abs=0.05)


def test_arrivals_are_the_seeds_and_come_at_the_rate() -> None:
    once = list(arrivals(plan(rate=50.0, num_requests=4000, seed=3)))
    assert once == list(arrivals(plan(rate=50.0, num_requests=4000, seed=3)))
    assert once == sorted(once)
    assert once != list(arrivals(plan(rate=50.0, num_requests=4000, seed=4)))
    assert once[-1] == pytest.approx(80, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"api": "grpc"}, "tgi, completions, chat"),
        ({"concurrency": None}, "one of concurrency, rate"),
        ({"rate": 1.0, "concurrency": 1}, "one of concurrency, rate"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"shared_fraction": 1.5}, "between 0 and 1"),
    ],
)
def test_plan_refuses_what_cannot_be(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        plan(**changes)
