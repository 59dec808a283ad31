"""Tokens that a grammar forces are appended by the host and computed as one chunk."""

from engine.core.sequence import SequenceStatus
from tests.engine.core.driver import Driver, decode, prompt, ranges


def test_forced_tokens_are_computed_in_one_step() -> None:
    driver = Driver()
    seq = driver.add(prompt(5), 20, guided=True)
    driver.force(seq, 6)
    decode(driver, 1)
    assert seq.num_generated == 7
    batch = driver.launch()
    assert ranges(batch) == {seq: (5, 12)}
    assert batch.reset == [seq], "the slot's tokens on the device are out of date"
    driver.collect()
    assert seq.num_generated == 8
    driver.drain()
    assert seq.num_generated == 20


def test_what_the_step_in_flight_samples_is_dropped_when_tokens_are_forced() -> None:
    driver = Driver()
    seq = driver.add(prompt(5), 20, guided=True)
    driver.force(seq, 6)
    driver.launch()
    driver.launch()
    driver.collect()
    assert (seq.num_generated, seq.num_in_flight) == (7, 0)
    assert ranges(driver.launch()) == {seq: (6, 12)}, "the sampled token is already being computed"
    driver.collect()
    assert seq.num_generated == 7
    driver.collect()
    assert seq.num_generated == 8
    driver.drain()


def test_forced_tokens_over_the_budget_are_computed_in_chunks() -> None:
    driver = Driver(max_batch_tokens=8)
    seq = driver.add(prompt(5), 30, guided=True)
    driver.force(seq, 20)
    decode(driver, 1)
    batches = [driver.launch()]
    driver.collect()
    batches.append(driver.launch())
    driver.collect()
    batches.append(driver.launch())
    assert [ranges(batch)[seq] for batch in batches] == [(5, 13), (13, 21), (21, 26)]
    assert [batch.scheduled[0].samples for batch in batches] == [False, False, True]
    driver.collect()
    driver.drain()


def test_a_sequence_ends_at_max_tokens_within_its_forced_tokens() -> None:
    driver = Driver()
    seq = driver.add(prompt(5), 4, guided=True)
    driver.force(seq, 20)
    driver.launch()
    driver.launch()
    driver.collect()
    assert driver.finished == [seq]
    assert seq.num_generated == 4
    driver.drain()


def test_forced_tokens_may_preempt_a_younger_sequence_or_their_own() -> None:
    driver = Driver(num_blocks=4)
    first, second = (driver.add(prompt(15, stem), 40, guided=True) for stem in range(2))
    driver.force(first, 38)
    decode(driver, 1)
    assert ranges(driver.launch()) == {first: (15, 54)}
    assert list(driver.scheduler.waiting) == [second]
    driver.drain()
    driver = Driver(num_blocks=4)
    first, second = (driver.add(prompt(15, stem), 40, guided=True) for stem in range(2))
    driver.force(second, 38)
    decode(driver, 1)
    assert ranges(driver.launch()) == {first: (15, 16)}
    assert list(driver.scheduler.waiting) == [second]
    driver.drain()


def test_blocks_grown_before_a_preemption_in_the_same_step_are_not_listed() -> None:
    driver = Driver(num_blocks=22, max_sequences=2, max_batch_tokens=400)
    leader = driver.add(prompt(300), 2, num_forks=1, prompt_logprobs=True)
    (fork,) = leader.forks
    grows = driver.add(prompt(15, stem=1), 60, guided=True)
    driver.force(grows, 39)
    decode(driver, 1)
    slot = grows.slot
    batch = driver.launch()
    assert ranges(batch) == {leader: (256, 300), fork: (300, 300)}
    assert (fork.slot, batch.grown) == (slot, [])
    assert list(driver.scheduler.waiting) == [grows]
    driver.drain()


def test_tokens_are_forced_on_a_preempted_sequence_with_tokens_in_flight() -> None:
    driver = Driver(num_blocks=3)
    driver.add(prompt(31), 10)
    second = driver.add(prompt(4, stem=1), 12, guided=True)
    decode(driver, 1)
    driver.force(second, 5)
    driver.launch()
    driver.launch()
    assert (second.status, second.num_in_flight) == (SequenceStatus.WAITING, 1)
    driver.collect()
    assert (second.num_generated, second.num_in_flight) == (7, 0)
    driver.drain()


def test_forced_tokens_of_a_lost_step_are_computed_again() -> None:
    driver = Driver()
    seq = driver.add(prompt(5), 20, guided=True)
    driver.force(seq, 6)
    decode(driver, 1)
    driver.launch()
    driver.lose(isolate=False)
    assert ranges(driver.launch()) == {seq: (5, 12)}
    driver.drain()
    assert seq.num_generated == 20


def test_tokens_can_be_forced_on_a_fork_right_after_its_first_step() -> None:
    driver = Driver()
    leader = driver.add(prompt(20), 20, num_forks=1, guided=True)
    (fork,) = leader.forks
    driver.force(fork, 4)
    driver.launch()
    driver.launch()
    driver.collect()
    assert ranges(driver.launch()) == {leader: (21, 22), fork: (21, 25)}
    driver.drain()
