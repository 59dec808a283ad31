"""The token budget, the order of sequences, and admission."""

from collections.abc import Sequence as Seq

import pytest

from engine.core.block_pool import BlockHash, BlockPool
from engine.core.pipeline import MAX_IN_FLIGHT
from engine.core.prefill_budget import PrefillBudget
from engine.core.scheduler import Scheduler
from engine.core.sequence import Sequence, SequenceStatus
from tests.engine.core.device_model import END, next_token
from tests.engine.core.driver import Driver, decode, prompt, ranges


class TestBudget:
    def test_the_budget_must_be_large_enough_for_every_decode(self) -> None:
        with pytest.raises(AssertionError):
            Scheduler(num_blocks=4, max_sequences=5, max_batch_tokens=4)

    def test_scheduling_without_sequences_gives_an_empty_batch(self) -> None:
        batch = Driver().launch()
        assert (batch.scheduled, batch.reset, batch.grown) == ([], [], [])

    def test_a_prompt_over_the_budget_is_computed_in_chunks(self) -> None:
        driver = Driver(max_batch_tokens=16)
        seq = driver.add(prompt(40), 2)
        batches = [driver.launch(), driver.launch()]
        driver.collect()
        batches.append(driver.launch())
        assert [ranges(batch)[seq] for batch in batches] == [(0, 16), (16, 32), (32, 40)]
        assert [batch.scheduled[0].samples for batch in batches] == [False, False, True]
        driver.drain()

    def test_decodes_run_in_every_step_beside_a_long_prompt(self) -> None:
        driver = Driver(max_batch_tokens=16, num_blocks=32)
        short = driver.add(prompt(4), 20)
        decode(driver, 1)
        long = driver.add(prompt(100, stem=1), 2)
        for i in range(6):
            batch = driver.launch()
            assert ranges(batch) == {short: (4 + i, 5 + i), long: (15 * i, 15 * i + 15)}
            driver.collect()
        driver.drain()

    def test_prefills_share_the_budget_in_order_of_arrival(self) -> None:
        driver = Driver(max_batch_tokens=32)
        first, second, third = (driver.add(prompt(20, stem), 2) for stem in range(3))
        assert ranges(driver.launch()) == {first: (0, 20), second: (0, 12)}
        # A sequence with half of its prompt computed holds blocks for all of it.
        assert len(second.block_table) == 2
        assert ranges(driver.launch()) == {first: (20, 21), second: (12, 20), third: (0, 20)}
        driver.collect()
        driver.drain()

    def test_a_last_chunk_of_one_token_samples_like_a_longer_one(self) -> None:
        driver = Driver(max_batch_tokens=16)
        seq = driver.add(prompt(17), 2)
        assert ranges(driver.launch()) == {seq: (0, 16)}
        batch = driver.launch()
        assert ranges(batch) == {seq: (16, 17)}
        assert batch.scheduled[0].samples
        driver.collect()
        driver.drain()

    def test_a_decode_is_launched_before_the_host_knows_its_input_token(self) -> None:
        driver = Driver()
        seq = driver.add(prompt(5), 8)
        driver.launch()
        assert ranges(driver.launch()) == {seq: (5, 6)}
        assert (seq.num_in_flight, len(seq.token_ids)) == (2, 5)
        driver.drain()
        assert seq.num_generated == 8

    @pytest.mark.parametrize("max_new_tokens", [1, 2, 3])
    def test_no_step_is_launched_past_max_tokens(self, max_new_tokens: int) -> None:
        driver = Driver()
        seq = driver.add(prompt(5), max_new_tokens)
        num_launches = 0
        while driver.live:
            while len(driver.in_flight) < MAX_IN_FLIGHT and driver.launch().scheduled:
                num_launches += 1
            driver.collect()
        assert num_launches == seq.num_generated == max_new_tokens

    def test_the_surplus_token_of_an_ended_sequence_is_dropped(self) -> None:
        driver = Driver(can_end=True)
        ending = next(p for p in map(prompt, range(1, 200)) if next_token(p) == END)
        seq = driver.add(ending, 8)
        driver.launch()
        driver.launch()
        driver.collect()
        assert driver.finished == [seq]
        assert driver.scheduler.pool.num_used == 0
        driver.collect()
        assert seq.token_ids == [*ending, END]


class TestAdmission:
    def test_no_more_sequences_run_than_there_are_slots(self) -> None:
        driver = Driver(max_sequences=2)
        sequences = [driver.add(prompt(4, stem), 3) for stem in range(3)]
        assert set(ranges(driver.launch())) == set(sequences[:2])
        driver.drain()

    def test_a_sequence_is_admitted_only_with_blocks_for_all_its_known_tokens(self) -> None:
        driver = Driver(num_blocks=4, max_batch_tokens=40)
        first = driver.add(prompt(30), 2)
        second = driver.add(prompt(33, stem=1), 2)
        third = driver.add(prompt(32, stem=2), 2)
        assert ranges(driver.launch()) == {first: (0, 30)}, (
            "the second needs three blocks, two are left"
        )
        assert (second.status, second.block_table) == (SequenceStatus.WAITING, [])
        driver.abort(second)
        assert ranges(driver.launch()) == {first: (30, 31), third: (0, 32)}
        driver.drain()

    def test_no_sequence_overtakes_the_head_of_the_queue(self) -> None:
        driver = Driver(num_blocks=4)
        driver.add(prompt(32), 4)
        driver.add(prompt(40, stem=1), 4)
        small = driver.add(prompt(1, stem=2), 4)
        driver.launch()
        assert small.status is SequenceStatus.WAITING
        driver.drain()


class TestIntegrity:
    @pytest.mark.parametrize("field", ["block_table", "slot", "num_computed"])
    def test_check_integrity_notices_a_sequence_changed_from_outside(self, field: str) -> None:
        driver = Driver()
        first, second = (driver.add(prompt(20, stem), 2) for stem in range(2))
        driver.launch()
        kept = getattr(first, field)
        setattr(first, field, 1000 if field == "num_computed" else getattr(second, field))
        with pytest.raises(AssertionError):
            driver.scheduler.check_integrity()
        setattr(first, field, kept)
        driver.drain()


class _Pool(BlockPool):
    """A pool that counts the hashes it has looked up."""

    num_lookups = 0

    def find(self, hashes: Seq[BlockHash]) -> list[int]:
        self.num_lookups += len(hashes)
        return super().find(hashes)


class TestWaitingForBlocks:
    """The head of the queue has a long cached prefix, and too few blocks are idle for the rest."""

    @staticmethod
    def waiting(extra: int) -> tuple[Driver, _Pool, Sequence]:
        driver = Driver(num_blocks=40, max_batch_tokens=512)
        pool = driver.scheduler.pool = _Pool(40)
        driver.add(prompt(320), 1)
        driver.drain()
        running = driver.add(prompt(280, stem=1), 30)
        driver.launch()
        driver.collect()
        assert pool.num_cached == 20
        head = driver.add([*prompt(320), *prompt(extra, stem=2)], 1)
        driver.launch()
        assert running.status is SequenceStatus.RUNNING
        assert head.status is SequenceStatus.WAITING
        return driver, pool, head

    def test_the_prefix_is_not_looked_up_again_in_every_step(self) -> None:
        driver, pool, head = self.waiting(extra=60)
        before = pool.num_lookups
        for _ in range(8):
            driver.collect()
            driver.launch()
        assert head.status is SequenceStatus.WAITING
        assert pool.num_lookups - before <= 8
        driver.drain()

    def test_it_is_admitted_as_soon_as_its_blocks_are_idle(self) -> None:
        driver, _, head = self.waiting(extra=60)
        driver.abort(driver.live[0])
        batch = driver.launch()
        assert ranges(batch)[head] == (320, 380)
        driver.drain()


class TestWholeSteps:
    """Beside decodes a step may have 40 tokens of prompts, and captured steps have 16, 32 ..."""

    @staticmethod
    def decoding(num_decodes: int, limit: int = 40) -> Driver:
        driver = Driver(num_blocks=64, max_batch_tokens=128, step_multiple=16)
        for stem in range(num_decodes):
            driver.add(prompt(4, stem), 50)
        decode(driver, 1)
        driver.pipeline.prefill_budget = PrefillBudget(limit, limit)
        return driver

    @pytest.mark.parametrize("num_decodes", [1, 3])
    def test_a_long_prompt_fills_steps_up_to_a_multiple(self, num_decodes: int) -> None:
        driver = self.decoding(num_decodes)
        driver.add(prompt(100, stem=9), 1)
        sizes = []
        for _ in range(3):
            sizes.append(driver.launch().num_scheduled_tokens)
            driver.collect()
        assert sizes == [32, 32, 32]
        driver.drain()

    def test_a_short_prompt_is_computed_at_once(self) -> None:
        driver = self.decoding(2)
        driver.add(prompt(9, stem=9), 1)
        assert driver.launch().num_scheduled_tokens == 11
        driver.collect()
        driver.drain()

    def test_a_limit_below_the_smallest_size_is_used_whole(self) -> None:
        driver = self.decoding(2, limit=5)
        driver.add(prompt(100, stem=9), 1)
        assert driver.launch().num_scheduled_tokens == 7
        driver.collect()
        driver.drain()

    def test_a_prompt_alone_has_the_whole_budget(self) -> None:
        driver = Driver(num_blocks=64, max_batch_tokens=120, step_multiple=16)
        driver.add(prompt(300), 1)
        assert driver.launch().num_scheduled_tokens == 120
        driver.collect()
        driver.drain()
