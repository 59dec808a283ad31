"""Sequences share blocks of equal prefixes that completed steps have computed."""

import pytest

from engine.core.config import BLOCK_SIZE
from tests.engine.core.driver import Driver, decode, prompt, ranges


def test_a_cached_prefix_is_not_computed_again() -> None:
    driver = Driver()
    driver.add(prompt(40), 1)
    driver.drain()
    again = driver.add(prompt(40), 1)
    assert ranges(driver.launch()) == {again: (32, 40)}
    assert driver.scheduler.num_prefix_hit_tokens == 32
    assert driver.scheduler.num_prefix_lookup_tokens == 80
    driver.drain()


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 31, 32, 33])
def test_at_least_one_token_of_a_cached_prompt_is_computed(num_tokens: int) -> None:
    driver = Driver()
    driver.add(prompt(64), 1)
    driver.drain()
    seq = driver.add(prompt(num_tokens), 1)
    expected = (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert ranges(driver.launch()) == {seq: (expected, num_tokens)}
    driver.drain()


def test_generated_tokens_are_cached_like_prompt_tokens() -> None:
    driver = Driver()
    first = driver.add(prompt(20), 30)
    driver.drain()
    follow_up = driver.add([*first.token_ids, 2, 2], 1)
    assert ranges(driver.launch()) == {follow_up: (48, 52)}
    driver.drain()


def test_a_prefix_that_differs_in_one_token_is_not_found() -> None:
    driver = Driver()
    driver.add(prompt(40), 1)
    driver.drain()
    tokens = prompt(40)
    tokens[3] = 3
    seq = driver.add(tokens, 1)
    assert ranges(driver.launch()) == {seq: (0, 40)}
    driver.drain()


def test_a_block_is_not_found_while_its_step_is_in_flight() -> None:
    driver = Driver()
    driver.add(prompt(40), 4)
    driver.launch()
    second = driver.add(prompt(40), 4)
    assert ranges(driver.launch())[second] == (0, 40)
    driver.collect()
    third = driver.add(prompt(40), 4)
    assert ranges(driver.launch())[third] == (32, 40)
    driver.drain()


def test_each_chunk_is_found_once_its_own_step_is_collected() -> None:
    driver = Driver(max_batch_tokens=32)
    first = driver.add(prompt(64), 1)
    driver.launch()
    driver.launch()
    driver.collect()
    driver.abort(first)
    second = driver.add(prompt(64), 1)
    assert ranges(driver.launch()) == {second: (32, 64)}
    driver.drain()


def test_shared_blocks_stay_allocated_until_the_last_sequence_ends() -> None:
    driver = Driver(num_blocks=6)
    first = driver.add(prompt(40), 4)
    decode(driver, 1)
    second = driver.add(prompt(40), 20)
    driver.launch()
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert driver.scheduler.pool.num_used == 4
    driver.abort(first)
    assert driver.scheduler.pool.num_used == 3
    driver.drain()


def test_sharing_blocks_in_use_needs_no_idle_blocks() -> None:
    driver = Driver(num_blocks=4, max_batch_tokens=48)
    driver.add(prompt(40), 4)
    decode(driver, 1)
    second = driver.add(prompt(40), 4)
    assert ranges(driver.launch())[second] == (32, 40), "one idle block is enough"
    driver.drain()


def test_admission_does_not_count_found_idle_blocks_as_free() -> None:
    driver = Driver(num_blocks=4, max_batch_tokens=64)
    driver.add(prompt(33), 1)
    driver.drain()
    holder = driver.add(prompt(20, stem=1), 4)
    driver.launch()
    assert driver.scheduler.pool.num_idle == 2
    again = driver.add(prompt(33), 1)
    assert again not in ranges(driver.launch()), "its two cached blocks are the idle ones"
    driver.abort(holder)
    driver.drain()


def test_requests_with_different_cache_salts_share_no_blocks() -> None:
    driver = Driver()
    driver.add(prompt(40), 1, salt=b"alice")
    driver.drain()
    bob, unsalted, alice = (driver.add(prompt(40), 1, s) for s in (b"bob", b"", b"alice"))
    assert ranges(driver.launch()) == {bob: (0, 40), unsalted: (0, 24)}
    assert ranges(driver.launch()) == {unsalted: (24, 40), alice: (32, 40)}
    driver.drain()


def test_a_prefix_is_found_after_its_tail_was_evicted() -> None:
    driver = Driver(num_blocks=5, max_batch_tokens=80)
    driver.add(prompt(65), 1)
    driver.drain()
    driver.add(prompt(48, stem=1), 1)
    driver.drain()
    seq = driver.add(prompt(65), 1)
    assert ranges(driver.launch()) == {seq: (32, 65)}
    driver.drain()


def test_the_found_prefix_ends_at_the_first_missing_block() -> None:
    driver = Driver(num_blocks=5)
    driver.add(prompt(17), 1)
    longer = driver.add(prompt(33), 2)
    driver.launch()
    driver.drain()
    assert driver.finished[-1] is longer
    # The cached first block is the copy of the sequence that ended first: it is evicted first.
    driver.add(prompt(63, stem=1), 1)
    driver.drain()
    seq = driver.add(prompt(33), 1)
    assert ranges(driver.launch()) == {seq: (0, 33)}
    driver.drain()


def test_no_block_is_found_with_prefix_caching_off() -> None:
    driver = Driver(prefix_caching=False)
    for _ in range(2):
        seq = driver.add(prompt(40), 1)
        assert ranges(driver.launch()) == {seq: (0, 40)}
        driver.drain()
    assert driver.scheduler.pool.num_cached == 0
