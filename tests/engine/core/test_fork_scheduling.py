"""Forks share their leader's full blocks, copy its last block and sample from its logits."""

from dataclasses import replace

import pytest

from engine.core.sequence import Sequence, SequenceStatus
from tests.engine.core.driver import Driver, decode, prompt, ranges


def add_with_forks(driver: Driver, num_tokens: int, num_forks: int = 2) -> list[Sequence]:
    """Queue a request with forks; return the leader and its forks."""
    leader = driver.add(prompt(num_tokens), 8, num_forks=num_forks)
    return [leader, *leader.forks]


def test_a_prompt_is_computed_once_and_all_its_forks_sample_from_it() -> None:
    driver = Driver()
    leader, first, second = add_with_forks(driver, 20)
    batch = driver.launch()
    assert ranges(batch) == {leader: (0, 20), first: (20, 20), second: (20, 20)}
    assert [entry.samples for entry in batch.scheduled] == [True] * 3
    assert driver.scheduler.running == [leader, first, second]
    driver.drain()
    assert driver.finished == [leader, first, second]


def test_forks_share_full_blocks_and_copy_the_last_one() -> None:
    driver = Driver()
    leader, first, second = add_with_forks(driver, 40)
    batch = driver.launch()
    tables = [seq.block_table for seq in (leader, first, second)]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3
    assert batch.copies == [(tables[0][2], tables[1][2]), (tables[0][2], tables[2][2])]
    assert driver.scheduler.pool.num_used == 5
    driver.drain()


def test_no_block_is_copied_if_the_prompt_fills_its_blocks() -> None:
    driver = Driver()
    leader, first, second = add_with_forks(driver, 32)
    assert driver.launch().copies == []
    assert leader.block_table == first.block_table == second.block_table
    assert driver.scheduler.pool.num_used == 2
    driver.drain()


def test_forks_start_with_the_last_chunk_of_the_prompt() -> None:
    driver = Driver(max_batch_tokens=16)
    leader, first, second = add_with_forks(driver, 40)
    assert ranges(driver.launch()) == {leader: (0, 16)}
    assert ranges(driver.launch()) == {leader: (16, 32)}
    driver.collect()
    assert ranges(driver.launch()) == {leader: (32, 40), first: (40, 40), second: (40, 40)}
    driver.drain()


def test_forks_start_with_a_last_chunk_of_one_token() -> None:
    driver = Driver(max_batch_tokens=16)
    leader, first, second = add_with_forks(driver, 17)
    driver.launch()
    assert ranges(driver.launch()) == {leader: (16, 17), first: (17, 17), second: (17, 17)}
    driver.drain()


def test_starting_forks_takes_no_tokens_of_the_budget() -> None:
    driver = Driver(max_batch_tokens=20)
    add_with_forks(driver, 12)
    other = driver.add(prompt(30, stem=1), 2)
    batch = driver.launch()
    assert ranges(batch)[other] == (0, 8)
    driver.drain()


def test_forks_run_ahead_of_sequences_that_arrived_later() -> None:
    driver = Driver()
    leader, first, second = add_with_forks(driver, 20)
    other = driver.add(prompt(20, stem=1), 8)
    driver.launch()
    assert driver.scheduler.running == [leader, first, second, other]
    driver.drain()


def test_forks_run_ahead_of_younger_sequences_that_already_run() -> None:
    driver = Driver(num_blocks=32, max_batch_tokens=400)
    leader = driver.add(prompt(300), 2, num_forks=1, prompt_logprobs=True)
    (fork,) = leader.forks
    other = driver.add(prompt(15, stem=1), 4)
    decode(driver, 1)
    assert driver.scheduler.running == [leader, other]
    driver.launch()
    assert driver.scheduler.running == [leader, fork, other]
    driver.drain()


def test_a_fork_without_a_slot_waits_and_finds_the_prompt_in_the_cache() -> None:
    driver = Driver(max_sequences=2)
    leader, first, second = add_with_forks(driver, 40)
    later = driver.add(prompt(4, stem=1), 8)
    assert set(ranges(driver.launch())) == {leader, first}
    assert list(driver.scheduler.waiting) == [second, later]
    driver.collect()
    driver.abort(leader)
    assert ranges(driver.launch())[second] == (32, 40)
    driver.drain()


def test_a_fork_without_a_block_for_its_copy_waits() -> None:
    driver = Driver(num_blocks=3)
    leader, first, second = add_with_forks(driver, 20)
    assert set(ranges(driver.launch())) == {leader, first}
    assert list(driver.scheduler.waiting) == [second]
    driver.drain()
    assert set(driver.finished) == {leader, first, second}


def test_forks_of_a_prompt_that_fills_its_blocks_need_no_idle_block() -> None:
    driver = Driver(num_blocks=3)
    driver.add(prompt(15, stem=1), 1)
    _, first, second = add_with_forks(driver, 32)
    driver.launch()
    assert driver.scheduler.pool.num_idle == 0
    assert first.status is second.status is SequenceStatus.RUNNING
    driver.drain()


def test_a_fork_preempted_during_its_first_step_is_detached_from_its_leader() -> None:
    driver = Driver(num_blocks=2)
    leader, fork = add_with_forks(driver, 16, num_forks=1)
    driver.launch()
    driver.launch()
    assert (fork.status, fork.num_in_flight) == (SequenceStatus.WAITING, 1)
    assert fork.leader is None
    driver.abort(fork)
    driver.drain()
    assert driver.finished == [leader]


@pytest.mark.parametrize("num_tokens", [32, 40])
def test_forks_keep_the_prompt_when_their_leader_is_aborted(num_tokens: int) -> None:
    driver = Driver()
    leader, first, second = add_with_forks(driver, num_tokens)
    driver.launch()
    driver.abort(leader)
    behind = num_tokens, num_tokens + 1
    assert ranges(driver.launch()) == {first: behind, second: behind}
    driver.drain()
    assert driver.finished == [first, second]


def test_forks_of_a_leader_aborted_in_mid_prefill_head_the_queue() -> None:
    driver = Driver(max_batch_tokens=16)
    leader, first, second = add_with_forks(driver, 40)
    other = driver.add(prompt(20, stem=1), 8)
    decode(driver, 1)
    driver.abort(leader)
    assert list(driver.scheduler.waiting) == [first, second, other]
    assert first.leader is second.leader is None
    assert ranges(driver.launch()) == {first: (16, 32)}, "the first chunk is cached"
    driver.drain()
    assert set(driver.finished) == {first, second, other}


def test_forks_of_a_leader_aborted_in_the_queue_take_its_place() -> None:
    driver = Driver(max_sequences=1)
    running, ahead = driver.add(prompt(4, stem=1), 8), driver.add(prompt(4, stem=2), 8)
    leader, first, second = add_with_forks(driver, 20)
    behind = driver.add(prompt(4, stem=3), 8)
    driver.launch()
    driver.abort(leader)
    assert list(driver.scheduler.waiting) == [ahead, first, second, behind]
    driver.drain()
    assert driver.finished == [running, ahead, first, second, behind]


def test_a_fork_aborted_before_it_starts_never_runs() -> None:
    driver = Driver(max_batch_tokens=16)
    leader, first, second = add_with_forks(driver, 40)
    driver.launch()
    driver.abort(first)
    driver.abort(first)
    driver.drain()
    assert driver.finished == [leader, second]


def test_forks_whose_first_step_is_lost_return_to_the_queue_in_order() -> None:
    driver = Driver()
    leader, first, second = add_with_forks(driver, 20)
    other = driver.add(prompt(20, stem=1), 8)
    driver.launch()
    driver.launch()
    driver.lose(isolate=False)
    assert driver.scheduler.running == [leader, other]
    assert list(driver.scheduler.waiting) == [first, second]
    driver.drain()
    assert set(driver.finished) == {leader, first, second, other}


def test_forks_past_their_first_step_keep_running_when_a_step_is_lost() -> None:
    driver = Driver()
    leader, first, second = add_with_forks(driver, 20)
    decode(driver, 2)
    driver.launch()
    driver.lose(isolate=False)
    assert driver.scheduler.running == [leader, first, second]
    assert ranges(driver.launch()) == dict.fromkeys((leader, first, second), (21, 22))
    driver.drain()


def test_a_fork_that_wants_prompt_logprobs_computes_the_prompt_itself() -> None:
    driver = Driver()
    leader = driver.add(prompt(20), 8)
    fork = Sequence(replace(leader.request, prompt_logprobs=True), leader)
    driver.expected[fork] = driver.expected[leader]
    driver.live.append(fork)
    driver.scheduler.add(fork)
    assert ranges(driver.launch()) == {leader: (0, 20), fork: (0, 20)}
    driver.drain()
