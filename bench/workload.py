"""The workload of a load run: which prompts are sent to a server, and when.

Prompts are made without a tokenizer, from words that are one token each in the usual English
vocabularies. Their length is right to about a token; the report uses the server's own counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

APIS = ("tgi", "completions", "chat")


@dataclass(frozen=True, slots=True)
class LengthMix:
    """A distribution of lengths: weighted uniform ranges, both ends included."""

    text: str
    ranges: tuple[tuple[float, int, int], ...]

    @classmethod
    def parse(cls, text: str) -> "LengthMix":
        """Parse `128`, `64:256`, or a mix such as `0.7*32:64+0.3*512`."""
        try:
            ranges = tuple(_parse_range(part) for part in text.split("+"))
        except ValueError:
            raise _lengths_error(text) from None
        if abs(sum(weight for weight, _, _ in ranges) - 1) > 1e-6:
            raise _lengths_error(text)
        return cls(text, ranges)

    def sample(self, rng: Random) -> int:
        weights = [weight for weight, _, _ in self.ranges]
        _, low, high = rng.choices(self.ranges, weights)[0]
        return rng.randint(low, high)


def _parse_range(text: str) -> tuple[float, int, int]:
    weight_text, star, lengths = text.rpartition("*")
    low_text, colon, high_text = lengths.partition(":")
    weight = float(weight_text) if star else 1.0
    low = int(low_text)
    high = int(high_text) if colon else low
    if not (0 < weight <= 1 and 1 <= low <= high):
        raise ValueError
    return weight, low, high


def _lengths_error(text: str) -> ValueError:
    return ValueError(
        f"cannot read {text!r} as a length: write 128, or 64:256 for any length from 64 to "
        "256, or 0.7*32:64+0.3*512 for a mix whose weights sum to 1; lengths are at least 1"
    )


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is sent to a server, and when. The seed decides every random choice.

    A server that has seen the prompts of a seed may answer them from its prefix cache: use
    another seed for the next run.

    Exactly one of `concurrency` and `rate` is given. `concurrency` makes a closed loop, in which
    each slot sends its next request when its last is done; `rate` makes an open loop with
    Poisson arrivals per second.

    Every prompt starts with `shared_prefix_len` words beyond its `input_len`. About
    `shared_fraction` of the requests have the same words there, the others random ones: the
    fraction changes what can be reused, but not the length of prompts.
    """

    api: str
    num_requests: int
    input_len: LengthMix
    output_len: LengthMix
    concurrency: int | None = None
    rate: float | None = None
    shared_prefix_len: int = 0
    shared_fraction: float = 1.0
    seed: int = 0
    warmup: int = 0
    temperature: float = 0.0
    model: str = "tgi"
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for holds, complaint in (
            (self.api in APIS, f"api must be one of {', '.join(APIS)}"),
            ((self.concurrency is None) != (self.rate is None), "give one of concurrency, rate"),
            (self.concurrency is None or self.concurrency >= 1, "concurrency must be 1 or more"),
            (self.rate is None or self.rate > 0, "rate must be above 0 requests per second"),
            (self.num_requests >= 1, "num-requests must be 1 or more"),
            (self.shared_prefix_len >= 0, "shared-prefix-len must be 0 or more"),
            (0 <= self.shared_fraction <= 1, "shared-fraction must be between 0 and 1"),
            (self.warmup >= 0, "warmup must be 0 or more"),
            (self.temperature >= 0, "temperature must be 0 (greedy) or more"),
            (self.timeout_s > 0, "timeout-s must be above 0"),
        ):
            if not holds:
                raise ValueError(complaint)


_VOCABULARY = """
time people water world house point place case part group number problem fact month night
week year day hand side line head home room area money story family system program question
work government country state company service market party law book word business issue kind
power game car city name team minute idea body level office door person art war history
result reason research girl food moment air teacher force education
"""
_WORDS = _VOCABULARY.split()


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    num_words: int
    max_output_tokens: int
    seed: int


def arrivals(plan: LoadPlan) -> Iterator[float]:
    """Yield when each request of an open loop is sent, in seconds from the start."""
    assert plan.rate is not None
    rng = Random(f"{plan.seed}:arrivals")
    now_s = 0.0
    for _ in range(plan.num_requests):
        now_s += rng.expovariate(plan.rate)
        yield now_s


def make_prompts(plan: LoadPlan) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts of the warm-up and of the measured requests.

    They share the prefix, as in a steady state, and differ otherwise.
    """
    prefix = Random(f"{plan.seed}:prefix").choices(_WORDS, k=plan.shared_prefix_len)
    warmup_rng, rng = Random(f"{plan.seed}:warmup"), Random(f"{plan.seed}:requests")
    return (
        [_prompt(plan, prefix, warmup_rng) for _ in range(plan.warmup)],
        [_prompt(plan, prefix, rng) for _ in range(plan.num_requests)],
    )


def _prompt(plan: LoadPlan, prefix: list[str], rng: Random) -> Prompt:
    is_shared = rng.random() < plan.shared_fraction
    opening = prefix if is_shared else rng.choices(_WORDS, k=len(prefix))
    words = opening + rng.choices(_WORDS, k=plan.input_len.sample(rng))
    num_tokens = plan.output_len.sample(rng)
    return Prompt(" ".join(words), len(words), num_tokens, rng.getrandbits(32))
