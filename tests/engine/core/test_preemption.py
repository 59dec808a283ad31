"""When blocks run out, the youngest running sequence gives up its blocks and waits."""

from engine.core.sequence import Sequence, SequenceStatus
from tests.engine.core.driver import Driver, decode, prompt, ranges


def start_three_sequences(num_blocks: int = 6) -> tuple[Driver, list[Sequence]]:
    """Return a driver with three sequences that have filled two blocks each."""
    driver = Driver(num_blocks, max_batch_tokens=96)
    sequences = [driver.add(prompt(31, stem), 30) for stem in range(3)]
    decode(driver, 2)
    assert [seq.num_computed for seq in sequences] == [32, 32, 32]
    return driver, sequences


def test_the_youngest_sequence_is_preempted_to_the_head_of_the_queue() -> None:
    driver, (first, second, third) = start_three_sequences()
    late = driver.add(prompt(4, stem=3), 2)
    assert set(ranges(driver.launch())) == {first, second}
    assert list(driver.scheduler.waiting) == [third, late]
    assert (third.num_preemptions, driver.scheduler.num_preemptions) == (1, 1)
    assert (third.block_table, third.slot, third.num_computed) == ([], -1, 0)
    driver.drain()


def test_a_growing_decode_is_preempted_if_it_is_the_youngest() -> None:
    driver = Driver(num_blocks=3)
    first, second = driver.add(prompt(20), 4), driver.add(prompt(16, stem=1), 4)
    decode(driver, 1)
    assert ranges(driver.launch()) == {first: (20, 21)}
    assert list(driver.scheduler.waiting) == [second]
    driver.drain()


def test_several_preempted_sequences_wait_in_order_of_arrival() -> None:
    driver = Driver(num_blocks=4, max_batch_tokens=64)
    sequences = [driver.add(prompt(15, stem), 40) for stem in range(4)]
    decode(driver, 2)
    driver.launch()
    assert list(driver.scheduler.waiting) == sequences[2:]
    driver.drain()


def test_a_preempted_sequence_is_recomputed_with_the_same_output() -> None:
    driver, sequences = start_three_sequences()
    driver.drain()
    assert driver.scheduler.num_preemptions > 0
    assert driver.finished[0] is sequences[0]
    assert {seq.num_generated for seq in sequences} == {30}


def test_a_preempted_sequence_finds_its_cached_blocks_again() -> None:
    driver, (first, _, third) = start_three_sequences(num_blocks=7)
    decode(driver, 1)
    assert third.status is SequenceStatus.WAITING, "it was preempted, and one of its blocks evicted"
    driver.abort(first)
    assert ranges(driver.launch())[third] == (16, 33)
    driver.drain()


def test_a_preempted_sequence_is_not_readmitted_with_tokens_in_flight() -> None:
    driver = Driver(num_blocks=4)
    driver.add(prompt(24), 10)
    second = driver.add(prompt(23), 10)
    decode(driver, 8)
    driver.launch()
    driver.launch()
    assert (second.status, second.num_in_flight) == (SequenceStatus.WAITING, 1)
    assert driver.scheduler.pool.num_idle == 1, (
        "one idle block and its cached block would be enough"
    )
    driver.collect()
    assert ranges(driver.launch())[second] == (16, 32)
    driver.drain()


def test_a_preempted_sequence_finishes_when_its_last_token_arrives() -> None:
    driver = Driver(num_blocks=3)
    driver.add(prompt(31), 10)
    second = driver.add(prompt(4, stem=1), 2)
    decode(driver, 1)
    driver.launch()
    driver.launch()
    assert (second.status, second.num_in_flight) == (SequenceStatus.WAITING, 1)
    driver.collect()
    assert driver.finished == [second]
    driver.drain()


def test_a_step_launched_before_a_preemption_registers_no_blocks() -> None:
    driver = Driver(num_blocks=3)
    driver.add(prompt(31), 4)
    second = driver.add(prompt(15, stem=1), 4)
    decode(driver, 1)
    _, stale = driver.launch().scheduled
    assert (stale.sequence, stale.start) == (second, 15), "the step fills the block"
    driver.launch()
    assert not stale.is_current
    driver.collect()
    assert (second.num_completed, second.num_registered) == (0, 0)
    driver.drain()
