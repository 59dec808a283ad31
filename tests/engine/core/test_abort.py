"""A sequence can be aborted in any phase."""

from collections.abc import Callable

import pytest

from engine.core.scheduler import Batch
from engine.core.sequence import Sequence, SequenceStatus
from tests.engine.core.driver import Driver, decode, prompt, ranges


def start_waiting(driver: Driver) -> Sequence:
    return driver.add(prompt(40, stem=1), 4)


def start_mid_prefill(driver: Driver) -> Sequence:
    seq = driver.add(prompt(60, stem=1), 4)
    decode(driver, 1)
    assert 0 < seq.num_computed < 60
    return seq


def start_prefill_in_flight(driver: Driver) -> Sequence:
    seq = driver.add(prompt(60, stem=1), 4)
    driver.launch()
    driver.launch()
    return seq


def start_decoding(driver: Driver) -> Sequence:
    seq = driver.add(prompt(10, stem=1), 20)
    decode(driver, 5)
    assert seq.num_generated == 5
    return seq


def start_decode_in_flight(driver: Driver) -> Sequence:
    seq = start_decoding(driver)
    driver.launch()
    driver.launch()
    return seq


def start_rewound(driver: Driver) -> Sequence:
    seq = start_decode_in_flight(driver)
    driver.lose(isolate=False)
    return seq


Phase = Callable[[Driver], Sequence]
PHASES = [
    start_waiting,
    start_mid_prefill,
    start_prefill_in_flight,
    start_decoding,
    start_decode_in_flight,
    start_rewound,
]


@pytest.mark.parametrize("phase", PHASES)
def test_abort_releases_blocks_and_slot_at_once(phase: Phase) -> None:
    driver = Driver(max_batch_tokens=32)
    seq = phase(driver)
    driver.abort(seq)
    assert driver.scheduler.sequences == []
    assert driver.scheduler.pool.num_used == 0
    assert driver.scheduler.schedule() == Batch()
    while driver.in_flight:
        driver.collect()
    assert driver.scheduler.pool.num_used == 0


@pytest.mark.parametrize("phase", PHASES)
def test_abort_leaves_other_sequences_running(phase: Phase) -> None:
    driver = Driver(max_batch_tokens=32)
    before = driver.add(prompt(20), 12)
    seq = phase(driver)
    after = driver.add(prompt(20, stem=2), 12)
    driver.abort(seq)
    driver.drain()
    assert driver.finished == [before, after]


def test_abort_is_idempotent() -> None:
    driver = Driver()
    first, second = driver.add(prompt(20), 1), driver.add(prompt(20, stem=1), 9)
    driver.abort(first)
    driver.abort(first)
    driver.drain()
    driver.abort(second)
    assert second.is_finished


def test_a_preempted_sequence_can_be_aborted() -> None:
    driver = Driver(num_blocks=2)
    first, second = (driver.add(prompt(15, stem), 4) for stem in range(2))
    driver.launch()
    driver.launch()
    driver.collect()
    driver.launch()
    assert second.status is SequenceStatus.WAITING
    driver.abort(second)
    driver.drain()
    assert driver.finished == [first]


def test_only_completed_blocks_of_an_aborted_sequence_stay_cached() -> None:
    driver = Driver(max_batch_tokens=32)
    seq = start_prefill_in_flight(driver)
    driver.collect()
    driver.abort(seq)
    driver.collect()
    again = driver.add(prompt(60, stem=1), 1)
    assert ranges(driver.launch())[again] == (32, 60)
    driver.drain()


def test_a_block_released_with_its_step_in_flight_can_be_reused_at_once() -> None:
    driver = Driver(num_blocks=2, max_sequences=1)
    first = driver.add(prompt(31, stem=1), 1)
    driver.launch()
    driver.abort(first)
    driver.add(prompt(31, stem=2), 1)
    driver.launch()
    driver.drain()
