"""How requests for prompt logprobs are scheduled: rows of logits a step, and the prefix cache."""

from engine.core.scheduler import PROMPT_LOGPROB_ROWS
from tests.engine.core.driver import Driver, prompt, ranges


def test_a_step_computes_a_bounded_number_of_prompt_logprobs() -> None:
    """Two requests share the rows of a step, and a request without logprobs is not held up."""
    driver = Driver(num_blocks=64, max_batch_tokens=600)
    first = driver.add(prompt(300), 2, prompt_logprobs=True)
    plain = driver.add(prompt(20, stem=1), 2)
    second = driver.add(prompt(100, stem=2), 2, prompt_logprobs=True)
    assert ranges(driver.launch()) == {first: (0, PROMPT_LOGPROB_ROWS), plain: (0, 20)}
    batch = driver.launch()
    assert ranges(batch) == {plain: (20, 21), first: (256, 300), second: (0, 100)}
    assert [entry.num_prompt_rows for entry in batch.scheduled] == [0, 43, 99]
    assert batch.prompted == [1, 2]
    driver.drain()


def test_a_prompt_with_logprobs_ignores_cached_blocks_but_adds_its_own() -> None:
    driver = Driver()
    driver.add(prompt(40), 1)
    driver.drain()
    seq = driver.add(prompt(40), 1, prompt_logprobs=True)
    assert ranges(driver.launch()) == {seq: (0, 40)}
    driver.drain()
    driver.add(prompt(40, stem=1), 1, prompt_logprobs=True)
    driver.drain()
    again = driver.add(prompt(40, stem=1), 1)
    assert ranges(driver.launch()) == {again: (32, 40)}
    driver.drain()


def test_forks_share_a_prompt_whose_logprobs_are_wanted() -> None:
    driver = Driver()
    leader = driver.add(prompt(20), 4, num_forks=1, prompt_logprobs=True)
    (fork,) = leader.forks
    batch = driver.launch()
    assert ranges(batch) == {leader: (0, 20), fork: (20, 20)}
    assert [entry.num_prompt_rows for entry in batch.scheduled] == [19, 0]
    driver.drain()
