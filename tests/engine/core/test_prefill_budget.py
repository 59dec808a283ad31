"""Prompts are computed in chunks that keep the pace of the sequences that decode beside them."""

from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.prefill_budget import PrefillBudget
from tests.engine.core.driver import Driver, decode, prompt

MIN_TOKENS, MAX_TOKENS = 16, 256

StepTime = Callable[[int], float]
"""Seconds of a step with this many prompt tokens beside decodes."""


def steps_beside_decodes(
    budget: PrefillBudget, num_steps: int, step_s: StepTime
) -> Iterable[tuple[int, float]]:
    """Yield the prompt tokens and the time of each step beside four decodes.

    Two steps are in flight, so a limit is asked for before the step ahead of it is measured.
    """
    in_flight = 0
    for number in range(num_steps):
        chunk, in_flight = in_flight, budget.limit()
        if number:
            yield chunk, step_s(chunk)
            budget.observe(4, chunk, step_s(chunk))


def warmed_up(step_s: StepTime) -> PrefillBudget:
    """A budget that has seen what the engine's warm-up runs: a full prefill and some decodes."""
    budget = PrefillBudget(MIN_TOKENS, MAX_TOKENS)
    budget.observe(0, MAX_TOKENS, step_s(MAX_TOKENS))
    for _ in range(3):
        budget.observe(1, 0, step_s(0))
    return budget


@pytest.mark.parametrize("overhead_s", [0.0, 0.01, 0.02])
@pytest.mark.parametrize("token_s", [1e-5, 3e-4, 3e-3])
def test_a_step_beside_decodes_takes_less_than_three_times_as_long(
    overhead_s: float, token_s: float
) -> None:
    def step_s(chunk: int) -> float:
        return 0.06 + (overhead_s + token_s * chunk if chunk else 0.0)

    times = [s for _, s in steps_beside_decodes(warmed_up(step_s), 200, step_s)]
    assert max(times) < 3 * 0.06


def test_the_limit_follows_a_context_that_makes_tokens_slower() -> None:
    """As in a long prompt, whose last tokens attend to all before them."""
    done = 0

    def step_s(chunk: int) -> float:
        return 0.06 + chunk * (1e-3 + 1e-6 * done)

    chunks = []
    for chunk, seconds in steps_beside_decodes(warmed_up(step_s), 200, step_s):
        assert seconds < 3 * 0.06
        done += chunk
        chunks.append(chunk)
    assert max(chunks[:30]) > 1.5 * max(chunks[-30:])


def test_a_fast_device_keeps_the_whole_budget() -> None:
    budget = warmed_up(lambda chunk: 0.01 + 1e-6 * chunk)
    assert budget.limit() == MAX_TOKENS


@pytest.mark.parametrize("decode_s", [0.004, 0.01, 0.019])
def test_a_fast_device_may_take_a_fixed_time_however_short_its_decodes_are(
    decode_s: float,
) -> None:
    def step_s(chunk: int) -> float:
        return decode_s + 17e-6 * chunk

    budget = PrefillBudget(512, 8192, step_s=0.05)
    budget.observe(0, 8192, step_s(8192) - decode_s)
    for _ in range(3):
        budget.observe(4, 0, step_s(0))
    steps = list(steps_beside_decodes(budget, 100, step_s))[1:]
    # The full prefill ran without decodes, so the first estimate is a little low.
    assert max(seconds for _, seconds in steps) < 0.06
    assert min(chunk for chunk, _ in steps if chunk) > (0.045 - decode_s) / 17e-6


def test_a_slow_device_keeps_the_pace_of_its_decodes() -> None:
    def step_s(chunk: int) -> float:
        return 0.06 + 2e-4 * chunk

    budget = PrefillBudget(64, 8192, step_s=0.05)
    budget.observe(0, 8192, step_s(8192))
    for _ in range(3):
        budget.observe(4, 0, step_s(0))
    steps = list(steps_beside_decodes(budget, 100, step_s))[1:]
    assert 0.1 < max(seconds for _, seconds in steps) < 3 * 0.06


def test_nothing_is_limited_before_anything_was_measured() -> None:
    budget = PrefillBudget(MIN_TOKENS, MAX_TOKENS)
    assert budget.limit() == MAX_TOKENS
    budget.observe(0, MAX_TOKENS, 9.0)
    assert budget.limit() == MAX_TOKENS


def test_a_prompt_always_advances_however_slow_its_tokens_are() -> None:
    budget = warmed_up(lambda chunk: 0.01 + 100 * chunk)
    assert budget.limit() == MIN_TOKENS


def test_tokens_that_take_no_time_are_not_limited() -> None:
    budget = warmed_up(lambda chunk: 0.01 + 1e-3 * chunk)
    for _ in range(2000):
        budget.observe(4, MAX_TOKENS, 0.0)
        budget.observe(4, 0, 1e6)
    assert budget.limit() == MAX_TOKENS


def test_one_disturbed_step_does_not_allow_a_long_one() -> None:
    def step_s(chunk: int) -> float:
        return 0.05 + 1e-3 * chunk

    budget = warmed_up(step_s)
    before = budget.limit()
    budget.observe(4, 0, 5.0)
    assert budget.limit() == before


def test_short_prompts_teach_nothing_about_long_ones() -> None:
    budget = warmed_up(lambda chunk: 0.05 + 1e-3 * chunk)
    before = budget.limit()
    for seconds in (0.05, 0.5):
        for _ in range(20):
            budget.observe(0, 5, seconds)
    assert budget.limit() == before


def test_decodes_are_measured_again_while_prompts_never_end() -> None:
    """Sixty sequences take longer than one, and the prompts beside them may, too."""
    budget = warmed_up(lambda chunk: 0.01 + 1e-3 * chunk)
    alone = budget.limit()

    def step_s(chunk: int) -> float:
        return 0.1 + 1e-3 * chunk

    chunks = [chunk for chunk, _ in steps_beside_decodes(budget, 400, step_s)]
    assert chunks.count(0) >= 5
    assert chunks.count(0) <= len(chunks) / 20
    assert max(chunks[-30:]) > 4 * alone


@given(
    st.lists(
        st.tuples(
            st.integers(0, 300), st.integers(0, 300), st.floats(0, 1e6) | st.sampled_from([0.0])
        )
    )
)
def test_the_limit_is_within_the_budget_whatever_was_measured(
    steps: list[tuple[int, int, float]],
) -> None:
    budget = PrefillBudget(MIN_TOKENS, MAX_TOKENS)
    for num_decodes, num_prefill_tokens, seconds in steps:
        budget.observe(num_decodes, num_prefill_tokens, seconds)
        limit = budget.limit()
        assert limit == 0 or MIN_TOKENS <= limit <= MAX_TOKENS
        assert limit or budget.limit() > 0, "two steps in a row without prompt tokens"


class TestInThePipeline:
    """The device takes a second for a step and half a second for each of its tokens."""

    def driver(self) -> Driver:
        driver = Driver(num_blocks=64, max_sequences=4, max_batch_tokens=64, token_s=0.5)
        driver.add(prompt(64), 60)
        decode(driver, 4)
        return driver

    def test_a_long_prompt_beside_a_decode_is_computed_in_small_chunks(self) -> None:
        driver = self.driver()
        driver.add(prompt(200, stem=1), 1)
        chunks = []
        while len(driver.live) > 1:
            batch = driver.launch()
            chunks.append(batch.num_scheduled_tokens - 1)
            driver.collect()
        assert max(chunks) <= 5
        assert sum(chunks) == 200
        driver.drain()

    def test_a_prompt_alone_has_the_whole_budget(self) -> None:
        driver = self.driver()
        driver.abort(driver.live[0])
        driver.add(prompt(200, stem=1), 1)
        assert driver.launch().num_scheduled_tokens == 64
        driver.collect()
        driver.drain()

    def test_prompts_that_arrive_together_share_the_limit(self) -> None:
        driver = self.driver()
        for stem in (1, 2):
            driver.add(prompt(30, stem=stem), 1)
        assert driver.launch().num_scheduled_tokens <= 1 + 5
        driver.collect()
        driver.drain()


@pytest.mark.parametrize("num_decodes", [1, 10, 250])
def test_one_slow_step_does_not_keep_prompts_at_their_least(num_decodes: int) -> None:
    """A step that fills a whole size may have fewer tokens than the least there is to be."""
    decode_s, token_s, multiple = 0.01, 1e-5, 256
    budget = PrefillBudget(512, 8192, step_s=0.05, step_multiple=multiple)
    budget.observe(num_decodes, 0, decode_s)
    budget.observe(num_decodes, 4096, decode_s + 4096 * token_s)
    usual = budget.limit()
    budget.observe(num_decodes, 4096, 3.0)
    assert budget.limit() == 512
    for _ in range(60):
        limit = budget.limit()
        chunk = limit - (num_decodes + limit) % multiple
        budget.observe(num_decodes, max(chunk, 0), decode_s + token_s * max(chunk, 0))
    assert budget.limit() > 0.9 * usual
