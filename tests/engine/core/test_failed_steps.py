"""Steps that fail: sequences are rewound, and the sequence that causes the failure is found."""

import pytest

from engine.core.sequence import SequenceStatus
from tests.engine.core.driver import Driver, decode, prompt, ranges


class TestRewind:
    def test_rewind_returns_to_the_tokens_of_completed_steps(self) -> None:
        driver = Driver()
        seq = driver.add(prompt(20), 20)
        decode(driver, 3)
        driver.launch()
        driver.launch()
        assert (seq.num_tokens, seq.num_computed, len(seq.token_ids)) == (25, 24, 23)
        driver.lose(isolate=False)
        assert (seq.num_tokens, seq.num_computed) == (23, 22)
        batch = driver.launch()
        assert ranges(batch) == {seq: (22, 23)}
        assert batch.reset == [seq]
        assert driver.launch().reset == []
        driver.drain()
        assert seq.num_generated == 20

    @pytest.mark.parametrize("built", [True, False], ids=["lost on the device", "lost at launch"])
    def test_rewind_of_a_first_step_returns_to_the_cached_prefix(self, built: bool) -> None:
        driver = Driver()
        driver.add(prompt(40), 1)
        driver.drain()
        seq = driver.add(prompt(60), 4)
        driver.launch(built=built)
        driver.lose(isolate=False)
        batch = driver.launch()
        assert ranges(batch) == {seq: (32, 60)}
        assert batch.reset == [seq]
        driver.drain()

    def test_blocks_of_a_lost_step_are_not_cached(self) -> None:
        driver = Driver(max_batch_tokens=96)
        seq = driver.add(prompt(40), 4)
        driver.launch()
        driver.lose(isolate=False)
        driver.abort(seq)
        again = driver.add(prompt(40), 1)
        assert ranges(driver.launch()) == {again: (0, 40)}
        driver.drain()

    def test_a_block_grown_by_a_lost_step_is_kept_and_used(self) -> None:
        driver = Driver()
        seq = driver.add(prompt(16), 20)
        decode(driver, 1)
        assert driver.launch(built=False).grown
        driver.lose(isolate=False)
        batch = driver.launch()
        assert (batch.reset, batch.grown) == ([seq], [])
        assert len(seq.block_table) == 2
        driver.drain()

    def test_rewind_of_a_preempted_sequence_drops_its_tokens_in_flight(self) -> None:
        driver = Driver(num_blocks=2)
        _, second = (driver.add(prompt(15, stem), 4) for stem in range(2))
        decode(driver, 1)
        driver.launch()
        driver.launch()
        assert second.status is SequenceStatus.WAITING
        driver.lose(isolate=False)
        assert second.num_in_flight == 0
        driver.drain()
        assert len(driver.finished) == 2

    def test_the_oldest_of_several_rewound_prefills_goes_first(self) -> None:
        driver = Driver(max_batch_tokens=32)
        first, second = (driver.add(prompt(24, stem), 4) for stem in range(2))
        driver.launch()
        driver.launch()
        driver.lose(isolate=False)
        assert ranges(driver.launch()) == {first: (0, 24), second: (0, 8)}
        driver.drain()

    def test_a_rewound_sequence_of_one_token_does_not_run_once_preempted(self) -> None:
        driver = Driver(num_blocks=2)
        first = driver.add(prompt(15), 4)
        decode(driver, 1)
        second = driver.add(prompt(1, stem=1), 4)
        driver.launch()
        driver.lose(isolate=False)
        driver.launch(only={first})
        driver.collect()
        assert ranges(driver.launch()) == {first: (16, 17)}
        assert list(driver.scheduler.waiting) == [second]
        driver.drain()

    def test_a_rewound_sequence_that_is_aborted_is_not_reset(self) -> None:
        driver = Driver()
        first, second = (driver.add(prompt(20, stem), 8) for stem in range(2))
        driver.launch()
        driver.lose(isolate=False)
        driver.abort(first)
        assert driver.launch().reset == [second]
        driver.drain()

    def test_a_rewound_sequence_preempted_in_the_next_step_is_not_reset(self) -> None:
        driver = Driver(num_blocks=3)
        first = driver.add(prompt(15), 8)
        second = driver.add(prompt(20, stem=1), 8)
        decode(driver, 2)
        driver.launch(only={second})
        driver.lose(isolate=False)
        batch = driver.launch()
        assert ranges(batch) == {first: (16, 17)}
        assert batch.reset == []
        driver.drain()

    def test_a_pending_reset_survives_an_empty_batch(self) -> None:
        driver = Driver()
        first, second = (driver.add(prompt(20, stem), 8) for stem in range(2))
        driver.launch(built=False)
        driver.lose()
        driver.abort(first)
        driver.step()
        driver.step()
        assert second.num_generated == 1
        driver.drain()

    def test_a_pending_reset_survives_another_failed_step(self) -> None:
        driver = Driver()
        first, second = (driver.add(prompt(20, stem), 8) for stem in range(2))
        driver.launch(built=False)
        driver.lose()
        driver.launch_suspects(built=False)
        driver.lose()
        driver.abort(first)
        driver.drain()
        assert driver.finished == [second]


class TestFailedLaunch:
    def test_no_step_is_launched_until_the_failed_launch_is_collected(self) -> None:
        """The device has missed the block that the failed step appended. A step launched before the
        slot is reset would write to a block of another sequence.
        """
        driver = Driver()
        seq, other = driver.add(prompt(15), 8), driver.add(prompt(15, stem=1), 8)
        driver.launch()
        driver.device.fails_next = True
        driver.step()
        assert len(driver.in_flight) == 1
        assert driver.device.has_failed
        driver.step()
        assert not driver.in_flight
        assert driver.pipeline.is_isolating
        driver.drain()
        assert set(driver.finished) == {seq, other}

    def test_only_the_sequence_that_fails_alone_fails(self) -> None:
        driver = Driver()
        first, second, third = (driver.add(prompt(20, stem), 4) for stem in range(3))
        driver.launch(built=False)
        driver.collect()
        driver.launch_suspects(built=False)  # the first sequence alone
        driver.collect()
        driver.drain()
        assert (driver.failed, driver.finished) == ([first], [second, third])

    def test_a_sequence_that_is_only_in_the_step_after_the_failed_one_is_rewound(self) -> None:
        driver = Driver(max_batch_tokens=20)
        first, second = (driver.add(prompt(20, stem), 4) for stem in range(2))
        driver.launch()
        assert second in ranges(driver.launch())
        driver.lose()
        assert second.num_computed == 0
        driver.drain()
        assert (driver.failed, driver.finished) == ([first], [second])


class TestScheduleOnly:
    def test_only_the_given_sequences_run_and_none_is_admitted(self) -> None:
        driver = Driver(max_batch_tokens=32)
        first, second = (driver.add(prompt(10, stem), 8) for stem in range(2))
        decode(driver, 1)
        long = driver.add(prompt(60, stem=2), 8)
        decode(driver, 1)
        waiting = driver.add(prompt(4, stem=3), 8)
        assert set(ranges(driver.launch(only={second, waiting}))) == {second}
        driver.collect()
        assert set(ranges(driver.launch(only={long}))) == {long}
        driver.collect()
        assert set(ranges(driver.launch())) >= {first, second, long}
        driver.drain()

    def test_scheduling_only_an_empty_set_gives_an_empty_batch(self) -> None:
        driver = Driver()
        driver.add(prompt(10), 2)
        assert driver.launch(only=set()).scheduled == []
        driver.drain()
