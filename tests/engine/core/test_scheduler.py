"""Who runs when, on which blocks: every rule of the scheduler, then all of them at random.

Each launch of the `Driver` checks the contents of every block that is read, and each
operation the invariants; a test adds only what is special about its case.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.core.config import BLOCK_SIZE
from engine.core.pipeline import MAX_IN_FLIGHT
from engine.core.scheduler import PROMPT_LOGPROB_ROWS, Batch, Scheduler
from engine.core.sequence import Sequence, SequenceStatus
from tests.engine.core.scheduling import END, Driver, next_token
from tests.thorough import THOROUGH


def prompt(num_tokens: int, stem: int = 0) -> list[int]:
    """Prompts of one stem are prefixes of each other; of two, differ in the first token."""
    return [1 + (stem >> (i % 8) & 1) for i in range(num_tokens)]


def ranges(batch: Batch) -> dict[Sequence, tuple[int, int]]:
    return {entry.sequence: (entry.start, entry.end) for entry in batch.scheduled}


def decode(driver: Driver, num_steps: int) -> None:
    for _ in range(num_steps):
        driver.launch()
        driver.collect()


class TestBudget:
    def test_the_budget_must_hold_every_decode(self) -> None:
        with pytest.raises(AssertionError):
            Scheduler(num_blocks=4, max_sequences=5, max_batch_tokens=4)

    def test_nothing_to_do_is_an_empty_batch(self) -> None:
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
        # Half a prompt is as good as running: it holds all of its blocks.
        assert len(second.block_table) == 2
        assert ranges(driver.launch()) == {first: (20, 21), second: (12, 20), third: (0, 20)}
        driver.collect()
        driver.drain()

    def test_a_last_chunk_of_one_token_needs_no_other_rule(self) -> None:
        driver = Driver(max_batch_tokens=16)
        seq = driver.add(prompt(17), 2)
        assert ranges(driver.launch()) == {seq: (0, 16)}
        batch = driver.launch()
        assert ranges(batch) == {seq: (16, 17)}
        assert batch.scheduled[0].samples
        driver.collect()
        driver.drain()

    def test_a_step_is_launched_on_ids_that_are_still_on_the_device(self) -> None:
        driver = Driver()
        seq = driver.add(prompt(5), 8)
        driver.launch()
        assert ranges(driver.launch()) == {seq: (5, 6)}
        assert (seq.num_in_flight, len(seq.token_ids)) == (2, 5)
        driver.drain()
        assert seq.num_generated == 8

    @pytest.mark.parametrize("max_new_tokens", [1, 2, 3])
    def test_nothing_runs_past_max_tokens(self, max_new_tokens: int) -> None:
        driver = Driver()
        seq = driver.add(prompt(5), max_new_tokens)
        num_launches = 0
        while driver.live:
            while len(driver.in_flight) < MAX_IN_FLIGHT and driver.launch().scheduled:
                num_launches += 1
            driver.collect()
        assert num_launches == seq.num_generated == max_new_tokens

    def test_a_surplus_step_after_the_end_is_dropped(self) -> None:
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
    def test_no_more_run_than_there_are_slots(self) -> None:
        driver = Driver(max_sequences=2)
        sequences = [driver.add(prompt(4, stem), 3) for stem in range(3)]
        assert set(ranges(driver.launch())) == set(sequences[:2])
        driver.drain()

    def test_admitted_with_blocks_for_every_known_token_or_not_at_all(self) -> None:
        driver = Driver(num_blocks=4, max_batch_tokens=40)
        first = driver.add(prompt(30), 2)
        second = driver.add(prompt(33, stem=1), 2)
        third = driver.add(prompt(32, stem=2), 2)
        assert ranges(driver.launch()) == {first: (0, 30)}, "three blocks for the second, two left"
        assert (second.status, second.block_table) == (SequenceStatus.WAITING, [])
        driver.abort(second)
        assert ranges(driver.launch()) == {first: (30, 31), third: (0, 32)}
        driver.drain()

    def test_nobody_overtakes_the_head_of_the_queue(self) -> None:
        driver = Driver(num_blocks=4)
        driver.add(prompt(32), 4)
        driver.add(prompt(40, stem=1), 4)
        small = driver.add(prompt(1, stem=2), 4)
        driver.launch()
        assert small.status is SequenceStatus.WAITING
        driver.drain()


class TestPrefixCaching:
    def test_a_finished_prefix_is_computed_once(self) -> None:
        driver = Driver()
        driver.add(prompt(40), 1)
        driver.drain()
        again = driver.add(prompt(40), 1)
        assert ranges(driver.launch()) == {again: (32, 40)}
        assert driver.scheduler.num_prefix_hit_tokens == 32
        assert driver.scheduler.num_prefix_lookup_tokens == 80
        driver.drain()

    @pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 31, 32, 33])
    def test_at_least_one_token_is_computed(self, num_tokens: int) -> None:
        driver = Driver()
        driver.add(prompt(64), 1)
        driver.drain()
        seq = driver.add(prompt(num_tokens), 1)
        expected = (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert ranges(driver.launch()) == {seq: (expected, num_tokens)}
        driver.drain()

    def test_what_a_request_generated_is_found_too(self) -> None:
        driver = Driver()
        first = driver.add(prompt(20), 30)
        driver.drain()
        follow_up = driver.add([*first.token_ids, 2, 2], 1)
        assert ranges(driver.launch()) == {follow_up: (48, 52)}
        driver.drain()

    def test_a_prefix_that_differs_in_one_token_is_not_found(self) -> None:
        driver = Driver()
        driver.add(prompt(40), 1)
        driver.drain()
        tokens = prompt(40)
        tokens[3] = 3
        seq = driver.add(tokens, 1)
        assert ranges(driver.launch()) == {seq: (0, 40)}
        driver.drain()

    def test_nothing_is_found_while_its_step_is_in_flight(self) -> None:
        driver = Driver()
        driver.add(prompt(40), 4)
        driver.launch()
        second = driver.add(prompt(40), 4)
        assert ranges(driver.launch())[second] == (0, 40)
        driver.collect()
        third = driver.add(prompt(40), 4)
        assert ranges(driver.launch())[third] == (32, 40)
        driver.drain()

    def test_each_chunk_is_found_when_its_own_step_is_done(self) -> None:
        driver = Driver(max_batch_tokens=32)
        first = driver.add(prompt(64), 1)
        driver.launch()
        driver.launch()
        driver.collect()
        driver.abort(first)
        second = driver.add(prompt(64), 1)
        assert ranges(driver.launch()) == {second: (32, 64)}
        driver.drain()

    def test_running_sequences_share_blocks_and_the_first_to_end_leaves_them(self) -> None:
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

    def test_shared_blocks_cost_no_idle_ones(self) -> None:
        driver = Driver(num_blocks=4, max_batch_tokens=48)
        driver.add(prompt(40), 4)
        decode(driver, 1)
        second = driver.add(prompt(40), 4)
        assert ranges(driver.launch())[second] == (32, 40), "one idle block is enough"
        driver.drain()

    def test_cached_blocks_are_counted_as_taken_when_they_are_found(self) -> None:
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

    def test_other_salts_share_nothing(self) -> None:
        driver = Driver()
        driver.add(prompt(40), 1, salt=b"alice")
        driver.drain()
        bob, nobody, alice = (driver.add(prompt(40), 1, s) for s in (b"bob", b"", b"alice"))
        assert ranges(driver.launch()) == {bob: (0, 40), nobody: (0, 24)}
        assert ranges(driver.launch()) == {nobody: (24, 40), alice: (32, 40)}
        driver.drain()

    def test_an_evicted_tail_leaves_its_prefix_findable(self) -> None:
        driver = Driver(num_blocks=5, max_batch_tokens=80)
        driver.add(prompt(65), 1)
        driver.drain()
        driver.add(prompt(48, stem=1), 1)
        driver.drain()
        seq = driver.add(prompt(65), 1)
        assert ranges(driver.launch()) == {seq: (32, 65)}
        driver.drain()

    def test_what_is_found_ends_at_the_first_missing_block(self) -> None:
        driver = Driver(num_blocks=5)
        driver.add(prompt(17), 1)
        longer = driver.add(prompt(33), 2)
        driver.launch()
        driver.drain()
        assert driver.finished[-1] is longer
        # The shared first block is the one of the sequence that ended first: reused first.
        driver.add(prompt(63, stem=1), 1)
        driver.drain()
        seq = driver.add(prompt(33), 1)
        assert ranges(driver.launch()) == {seq: (0, 33)}
        driver.drain()

    def test_without_prefix_caching_nothing_is_found(self) -> None:
        driver = Driver(prefix_caching=False)
        for _ in range(2):
            seq = driver.add(prompt(40), 1)
            assert ranges(driver.launch()) == {seq: (0, 40)}
            driver.drain()
        assert driver.scheduler.pool.num_cached == 0


class TestPreemption:
    def start(self, num_blocks: int = 6) -> tuple[Driver, list[Sequence]]:
        """Three sequences that have filled two blocks each."""
        driver = Driver(num_blocks, max_batch_tokens=96)
        sequences = [driver.add(prompt(31, stem), 30) for stem in range(3)]
        decode(driver, 2)
        assert [seq.num_computed for seq in sequences] == [32, 32, 32]
        return driver, sequences

    def test_the_youngest_makes_room_and_waits_at_the_head(self) -> None:
        driver, (first, second, third) = self.start()
        late = driver.add(prompt(4, stem=3), 2)
        assert set(ranges(driver.launch())) == {first, second}
        assert list(driver.scheduler.waiting) == [third, late]
        assert (third.num_preemptions, driver.scheduler.num_preemptions) == (1, 1)
        assert (third.block_table, third.slot, third.num_computed) == ([], -1, 0)
        driver.drain()

    def test_a_decode_that_is_the_youngest_itself_gives_way(self) -> None:
        driver = Driver(num_blocks=3)
        first, second = driver.add(prompt(20), 4), driver.add(prompt(16, stem=1), 4)
        decode(driver, 1)
        assert ranges(driver.launch()) == {first: (20, 21)}
        assert list(driver.scheduler.waiting) == [second]
        driver.drain()

    def test_several_are_preempted_in_order_of_arrival(self) -> None:
        driver = Driver(num_blocks=4, max_batch_tokens=64)
        sequences = [driver.add(prompt(15, stem), 40) for stem in range(4)]
        decode(driver, 2)
        driver.launch()
        assert list(driver.scheduler.waiting) == sequences[2:]
        driver.drain()

    def test_it_is_recomputed_and_the_output_is_the_same(self) -> None:
        driver, sequences = self.start()
        driver.drain()
        assert driver.scheduler.num_preemptions > 0
        assert driver.finished[0] is sequences[0]
        assert {seq.num_generated for seq in sequences} == {30}

    def test_its_cached_blocks_are_found_again(self) -> None:
        driver, (first, _, third) = self.start(num_blocks=7)
        decode(driver, 1)
        assert third.status is SequenceStatus.WAITING, "and one of its two blocks is taken"
        driver.abort(first)
        assert ranges(driver.launch())[third] == (16, 33)
        driver.drain()

    def test_it_is_not_readmitted_while_its_ids_are_in_flight(self) -> None:
        driver = Driver(num_blocks=4)
        driver.add(prompt(24), 10)
        second = driver.add(prompt(23), 10)
        decode(driver, 8)
        driver.launch()
        driver.launch()
        assert (second.status, second.num_in_flight) == (SequenceStatus.WAITING, 1)
        assert driver.scheduler.pool.num_idle == 1, "enough for it, with the block it shares"
        driver.collect()
        assert ranges(driver.launch())[second] == (16, 32)
        driver.drain()

    def test_one_whose_last_id_is_in_flight_finishes_from_the_queue(self) -> None:
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

    def test_a_step_from_before_the_preemption_registers_nothing(self) -> None:
        driver = Driver(num_blocks=3)
        driver.add(prompt(31), 4)
        second = driver.add(prompt(15, stem=1), 4)
        decode(driver, 1)
        _, stale = driver.launch().scheduled
        assert (stale.sequence, stale.start) == (second, 15), "it fills the block"
        driver.launch()
        assert not stale.is_current
        driver.collect()
        assert (second.num_completed, second.num_registered) == (0, 0)
        driver.drain()


class TestForks:
    def start(self, driver: Driver, num_tokens: int, num_forks: int = 2) -> list[Sequence]:
        """A leader and its forks."""
        leader = driver.add(prompt(num_tokens), 8, num_forks=num_forks)
        return [leader, *leader.forks]

    def test_the_prompt_is_computed_once_and_all_sample_from_it(self) -> None:
        driver = Driver()
        leader, first, second = self.start(driver, 20)
        batch = driver.launch()
        assert ranges(batch) == {leader: (0, 20), first: (20, 20), second: (20, 20)}
        assert [entry.samples for entry in batch.scheduled] == [True] * 3
        assert driver.scheduler.running == [leader, first, second]
        driver.drain()
        assert driver.finished == [leader, first, second]

    def test_full_blocks_are_shared_and_the_last_one_is_copied_to_each(self) -> None:
        driver = Driver()
        leader, first, second = self.start(driver, 40)
        batch = driver.launch()
        tables = [seq.block_table for seq in (leader, first, second)]
        assert tables[0][:2] == tables[1][:2] == tables[2][:2]
        assert len({table[2] for table in tables}) == 3
        assert batch.copies == [(tables[0][2], tables[1][2]), (tables[0][2], tables[2][2])]
        assert driver.scheduler.pool.num_used == 5
        driver.drain()

    def test_of_whole_blocks_nothing_is_copied(self) -> None:
        driver = Driver()
        leader, first, second = self.start(driver, 32)
        assert driver.launch().copies == []
        assert leader.block_table == first.block_table == second.block_table
        assert driver.scheduler.pool.num_used == 2
        driver.drain()

    def test_forks_wait_for_the_last_chunk(self) -> None:
        driver = Driver(max_batch_tokens=16)
        leader, first, second = self.start(driver, 40)
        assert ranges(driver.launch()) == {leader: (0, 16)}
        assert ranges(driver.launch()) == {leader: (16, 32)}
        driver.collect()
        assert ranges(driver.launch()) == {leader: (32, 40), first: (40, 40), second: (40, 40)}
        driver.drain()

    def test_a_last_chunk_of_one_token_starts_them_too(self) -> None:
        driver = Driver(max_batch_tokens=16)
        leader, first, second = self.start(driver, 17)
        driver.launch()
        assert ranges(driver.launch()) == {leader: (16, 17), first: (17, 17), second: (17, 17)}
        driver.drain()

    def test_they_take_nothing_of_the_budget(self) -> None:
        driver = Driver(max_batch_tokens=20)
        self.start(driver, 12)
        other = driver.add(prompt(30, stem=1), 2)
        batch = driver.launch()
        assert ranges(batch)[other] == (0, 8)
        driver.drain()

    def test_they_go_before_what_came_later(self) -> None:
        driver = Driver()
        leader, first, second = self.start(driver, 20)
        other = driver.add(prompt(20, stem=1), 8)
        driver.launch()
        assert driver.scheduler.running == [leader, first, second, other]
        driver.drain()

    def test_they_go_before_what_runs_already_behind_their_leader(self) -> None:
        driver = Driver(num_blocks=32, max_batch_tokens=400)
        leader = driver.add(prompt(300), 2, num_forks=1, prompt_logprobs=True)
        (fork,) = leader.forks
        other = driver.add(prompt(15, stem=1), 4)
        decode(driver, 1)
        assert driver.scheduler.running == [leader, other]
        driver.launch()
        assert driver.scheduler.running == [leader, fork, other]
        driver.drain()

    def test_a_fork_without_a_slot_waits_and_finds_the_prompt_in_the_cache(self) -> None:
        driver = Driver(max_sequences=2)
        leader, first, second = self.start(driver, 40)
        later = driver.add(prompt(4, stem=1), 8)
        assert set(ranges(driver.launch())) == {leader, first}
        assert list(driver.scheduler.waiting) == [second, later]
        driver.collect()
        driver.abort(leader)
        assert ranges(driver.launch())[second] == (32, 40)
        driver.drain()

    def test_a_fork_without_a_block_for_its_copy_waits(self) -> None:
        driver = Driver(num_blocks=3)
        leader, first, second = self.start(driver, 20)
        assert set(ranges(driver.launch())) == {leader, first}
        assert list(driver.scheduler.waiting) == [second]
        driver.drain()
        assert set(driver.finished) == {leader, first, second}

    def test_of_whole_blocks_no_idle_one_is_needed(self) -> None:
        driver = Driver(num_blocks=3)
        driver.add(prompt(15, stem=1), 1)
        _, first, second = self.start(driver, 32)
        driver.launch()
        assert driver.scheduler.pool.num_idle == 0
        assert first.status is second.status is SequenceStatus.RUNNING
        driver.drain()

    def test_one_that_is_preempted_before_its_first_step_is_done_is_an_ordinary_sequence(
        self,
    ) -> None:
        driver = Driver(num_blocks=2)
        leader, fork = self.start(driver, 16, num_forks=1)
        driver.launch()
        driver.launch()
        assert (fork.status, fork.num_in_flight) == (SequenceStatus.WAITING, 1)
        assert fork.leader is None
        driver.abort(fork)
        driver.drain()
        assert driver.finished == [leader]

    @pytest.mark.parametrize("num_tokens", [32, 40])
    def test_a_leader_that_leaves_leaves_the_prompt_to_its_forks(self, num_tokens: int) -> None:
        driver = Driver()
        leader, first, second = self.start(driver, num_tokens)
        driver.launch()
        driver.abort(leader)
        behind = num_tokens, num_tokens + 1
        assert ranges(driver.launch()) == {first: behind, second: behind}
        driver.drain()
        assert driver.finished == [first, second]

    def test_a_leader_that_leaves_in_mid_prefill_leaves_them_at_the_head_of_the_queue(self) -> None:
        driver = Driver(max_batch_tokens=16)
        leader, first, second = self.start(driver, 40)
        other = driver.add(prompt(20, stem=1), 8)
        decode(driver, 1)
        driver.abort(leader)
        assert list(driver.scheduler.waiting) == [first, second, other]
        assert first.leader is second.leader is None
        assert ranges(driver.launch()) == {first: (16, 32)}, "the first chunk was done"
        driver.drain()
        assert set(driver.finished) == {first, second, other}

    def test_a_leader_that_leaves_the_queue_leaves_them_its_place(self) -> None:
        driver = Driver(max_sequences=1)
        running, ahead = driver.add(prompt(4, stem=1), 8), driver.add(prompt(4, stem=2), 8)
        leader, first, second = self.start(driver, 20)
        behind = driver.add(prompt(4, stem=3), 8)
        driver.launch()
        driver.abort(leader)
        assert list(driver.scheduler.waiting) == [ahead, first, second, behind]
        driver.drain()
        assert driver.finished == [running, ahead, first, second, behind]

    def test_a_fork_that_leaves_before_it_starts_is_forgotten(self) -> None:
        driver = Driver(max_batch_tokens=16)
        leader, first, second = self.start(driver, 40)
        driver.launch()
        driver.abort(first)
        driver.abort(first)
        driver.drain()
        assert driver.finished == [leader, second]

    def test_a_lost_first_step_sends_them_back_to_the_queue_in_order(self) -> None:
        driver = Driver()
        leader, first, second = self.start(driver, 20)
        other = driver.add(prompt(20, stem=1), 8)
        driver.launch()
        driver.launch()
        driver.lose(isolate=False)
        assert driver.scheduler.running == [leader, other]
        assert list(driver.scheduler.waiting) == [first, second]
        driver.drain()
        assert set(driver.finished) == {leader, first, second, other}

    def test_after_their_first_step_they_are_rewound_where_they_are(self) -> None:
        driver = Driver()
        leader, first, second = self.start(driver, 20)
        decode(driver, 2)
        driver.launch()
        driver.lose(isolate=False)
        assert driver.scheduler.running == [leader, first, second]
        assert ranges(driver.launch()) == dict.fromkeys((leader, first, second), (21, 22))
        driver.drain()

    def test_one_that_asks_for_the_prompts_logprobs_computes_them_itself(self) -> None:
        driver = Driver()
        leader = driver.add(prompt(20), 8)
        fork = Sequence(replace(leader.request, prompt_logprobs=True), leader)
        driver.truths[fork] = driver.truths[leader]
        driver.live.append(fork)
        driver.scheduler.add(fork)
        assert ranges(driver.launch()) == {leader: (0, 20), fork: (0, 20)}
        driver.drain()


class TestPromptLogprobs:
    def test_a_step_keeps_a_bounded_number_of_them(self) -> None:
        """Two of them share the rows of a step, and what asks for none is not held up."""
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

    def test_the_cache_is_not_read_but_written(self) -> None:
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

    def test_forks_of_it_share_its_prompt_all_the_same(self) -> None:
        driver = Driver()
        leader = driver.add(prompt(20), 4, num_forks=1, prompt_logprobs=True)
        (fork,) = leader.forks
        batch = driver.launch()
        assert ranges(batch) == {leader: (0, 20), fork: (20, 20)}
        assert [entry.num_prompt_rows for entry in batch.scheduled] == [19, 0]
        driver.drain()


class TestForcedTokens:
    def test_forced_tokens_are_computed_as_a_slice(self) -> None:
        driver = Driver()
        seq = driver.add(prompt(5), 20, guided=True)
        driver.force(seq, 6)
        decode(driver, 1)
        assert seq.num_generated == 7
        batch = driver.launch()
        assert ranges(batch) == {seq: (5, 12)}
        assert batch.reset == [seq], "its slot counts other tokens"
        driver.collect()
        assert seq.num_generated == 8
        driver.drain()
        assert seq.num_generated == 20

    def test_the_step_in_flight_computes_and_draws_for_nothing(self) -> None:
        driver = Driver()
        seq = driver.add(prompt(5), 20, guided=True)
        driver.force(seq, 6)
        driver.launch()
        driver.launch()
        driver.collect()
        assert (seq.num_generated, seq.num_in_flight) == (7, 0)
        assert ranges(driver.launch()) == {seq: (6, 12)}, "the drawn one is being computed"
        driver.collect()
        assert seq.num_generated == 7
        driver.collect()
        assert seq.num_generated == 8
        driver.drain()

    def test_a_slice_over_the_budget_is_taken_in_chunks(self) -> None:
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

    def test_the_end_within_it_is_the_end(self) -> None:
        driver = Driver()
        seq = driver.add(prompt(5), 4, guided=True)
        driver.force(seq, 20)
        driver.launch()
        driver.launch()
        driver.collect()
        assert driver.finished == [seq]
        assert seq.num_generated == 4
        driver.drain()

    def test_it_may_preempt_for_its_blocks_and_be_preempted(self) -> None:
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

    def test_one_preempted_while_it_grows_leaves_no_block_to_the_next_owner_of_its_slot(
        self,
    ) -> None:
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

    def test_of_one_that_was_preempted_with_its_ids_in_flight(self) -> None:
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

    def test_a_lost_slice_is_computed_again(self) -> None:
        driver = Driver()
        seq = driver.add(prompt(5), 20, guided=True)
        driver.force(seq, 6)
        decode(driver, 1)
        driver.launch()
        driver.lose(isolate=False)
        assert ranges(driver.launch()) == {seq: (5, 12)}
        driver.drain()
        assert seq.num_generated == 20

    def test_a_fork_may_take_its_first_slice_at_once(self) -> None:
        driver = Driver()
        leader = driver.add(prompt(20), 20, num_forks=1, guided=True)
        (fork,) = leader.forks
        driver.force(fork, 4)
        driver.launch()
        driver.launch()
        driver.collect()
        assert ranges(driver.launch()) == {leader: (21, 22), fork: (21, 25)}
        driver.drain()


def waiting(driver: Driver) -> Sequence:
    return driver.add(prompt(40, stem=1), 4)


def mid_prefill(driver: Driver) -> Sequence:
    seq = driver.add(prompt(60, stem=1), 4)
    decode(driver, 1)
    assert 0 < seq.num_computed < 60
    return seq


def prefill_in_flight(driver: Driver) -> Sequence:
    seq = driver.add(prompt(60, stem=1), 4)
    driver.launch()
    driver.launch()
    return seq


def decoding(driver: Driver) -> Sequence:
    seq = driver.add(prompt(10, stem=1), 20)
    decode(driver, 5)
    assert seq.num_generated == 5
    return seq


def decode_in_flight(driver: Driver) -> Sequence:
    seq = decoding(driver)
    driver.launch()
    driver.launch()
    return seq


def rewound(driver: Driver) -> Sequence:
    seq = decode_in_flight(driver)
    driver.lose(isolate=False)
    return seq


Phase = Callable[[Driver], Sequence]
PHASES = [waiting, mid_prefill, prefill_in_flight, decoding, decode_in_flight, rewound]


class TestAbort:
    @pytest.mark.parametrize("phase", PHASES)
    def test_gives_everything_back_at_once(self, phase: Phase) -> None:
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
    def test_leaves_the_others_as_they_are(self, phase: Phase) -> None:
        driver = Driver(max_batch_tokens=32)
        before = driver.add(prompt(20), 12)
        seq = phase(driver)
        after = driver.add(prompt(20, stem=2), 12)
        driver.abort(seq)
        driver.drain()
        assert driver.finished == [before, after]

    def test_is_idempotent(self) -> None:
        driver = Driver()
        first, second = driver.add(prompt(20), 1), driver.add(prompt(20, stem=1), 9)
        driver.abort(first)
        driver.abort(first)
        driver.drain()
        driver.abort(second)
        assert second.is_finished

    def test_of_a_preempted_sequence(self) -> None:
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

    def test_completed_blocks_stay_usable_and_those_in_flight_do_not(self) -> None:
        driver = Driver(max_batch_tokens=32)
        seq = prefill_in_flight(driver)
        driver.collect()
        driver.abort(seq)
        driver.collect()
        again = driver.add(prompt(60, stem=1), 1)
        assert ranges(driver.launch())[again] == (32, 60)
        driver.drain()

    def test_the_next_owner_of_a_block_is_safe_from_a_step_in_flight(self) -> None:
        driver = Driver(num_blocks=2, max_sequences=1)
        first = driver.add(prompt(31, stem=1), 1)
        driver.launch()
        driver.abort(first)
        driver.add(prompt(31, stem=2), 1)
        driver.launch()
        driver.drain()


class TestRewind:
    def test_goes_back_to_what_completed_steps_have_left(self) -> None:
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

    @pytest.mark.parametrize("built", [True, False], ids=["on the device", "before it"])
    def test_of_a_first_step_starts_again_from_what_was_found(self, built: bool) -> None:
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

    def test_a_lost_step_makes_nothing_findable(self) -> None:
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

    def test_of_a_preempted_sequence_forgets_its_lost_ids(self) -> None:
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

    def test_of_several_prefills_lets_the_oldest_go_first(self) -> None:
        driver = Driver(max_batch_tokens=32)
        first, second = (driver.add(prompt(24, stem), 4) for stem in range(2))
        driver.launch()
        driver.launch()
        driver.lose(isolate=False)
        assert ranges(driver.launch()) == {first: (0, 24), second: (0, 8)}
        driver.drain()

    def test_of_one_token_then_preempted_does_not_run_as_a_decode(self) -> None:
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

    def test_an_aborted_sequence_is_not_reset(self) -> None:
        driver = Driver()
        first, second = (driver.add(prompt(20, stem), 8) for stem in range(2))
        driver.launch()
        driver.lose(isolate=False)
        driver.abort(first)
        assert driver.launch().reset == [second]
        driver.drain()

    def test_a_sequence_preempted_in_the_next_step_is_not_reset_without_a_slot(self) -> None:
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

    def test_a_reset_is_not_lost_with_an_empty_batch(self) -> None:
        driver = Driver()
        first, second = (driver.add(prompt(20, stem), 8) for stem in range(2))
        driver.launch(built=False)
        driver.lose()
        driver.abort(first)
        driver.step()
        driver.step()
        assert second.num_generated == 1
        driver.drain()

    def test_a_reset_is_not_lost_when_the_next_step_fails_as_well(self) -> None:
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
    def test_nothing_is_launched_until_the_failed_launch_was_collected(self) -> None:
        """The device has missed the block that the failed step appended: a step on top of it
        would write to a block of another sequence.
        """
        driver = Driver()
        seq, other = driver.add(prompt(15), 8), driver.add(prompt(15, stem=1), 8)
        driver.launch()
        driver.device.fails_next = True
        driver.step()
        assert len(driver.in_flight) == 1
        assert driver.device.has_failed
        driver.step()
        assert driver.in_flight == ()
        assert driver.pipeline.is_isolating
        driver.drain()
        assert set(driver.finished) == {seq, other}

    def test_the_sequence_that_fails_alone_is_the_only_one_to_fail(self) -> None:
        driver = Driver()
        first, second, third = (driver.add(prompt(20, stem), 4) for stem in range(3))
        driver.launch(built=False)
        driver.collect()
        driver.launch_suspects(built=False)  # the first alone
        driver.collect()
        driver.drain()
        assert (driver.failed, driver.finished) == ([first], [second, third])

    def test_a_sequence_that_is_only_in_the_step_behind_the_failed_one_is_rewound(self) -> None:
        driver = Driver(max_batch_tokens=20)
        first, second = (driver.add(prompt(20, stem), 4) for stem in range(2))
        driver.launch()
        assert second in ranges(driver.launch())
        driver.lose()
        assert second.num_computed == 0
        driver.drain()
        assert (driver.failed, driver.finished) == ([first], [second])


class TestOnly:
    def test_no_other_sequence_runs_and_none_is_admitted(self) -> None:
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

    def test_of_nobody_is_an_empty_batch(self) -> None:
        driver = Driver()
        driver.add(prompt(10), 2)
        assert driver.launch(only=set()).scheduled == []
        driver.drain()


class TestIntegrity:
    @pytest.mark.parametrize("field", ["block_table", "slot", "num_computed"])
    def test_a_sequence_changed_behind_the_schedulers_back_is_noticed(self, field: str) -> None:
        driver = Driver()
        first, second = (driver.add(prompt(20, stem), 2) for stem in range(2))
        driver.launch()
        kept = getattr(first, field)
        setattr(first, field, 1000 if field == "num_computed" else getattr(second, field))
        with pytest.raises(AssertionError):
            driver.scheduler.check_integrity()
        setattr(first, field, kept)
        driver.drain()


class SchedulerMachine(RuleBasedStateMachine):
    """Requests with common prefixes, and forks of them, come and go, tokens are forced, steps
    are launched, collected and lost.
    """

    @initialize(
        num_blocks=st.integers(4, 10) | st.integers(4, 24),
        max_sequences=st.integers(1, 6),
        extra_tokens=st.integers(0, 60),
        prefix_caching=st.sampled_from([True, True, True, False]),
        can_end=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        max_sequences: int,
        extra_tokens: int,
        prefix_caching: bool,
        can_end: bool,
    ) -> None:
        self.driver = Driver(
            num_blocks, max_sequences, max_sequences + extra_tokens, prefix_caching, can_end
        )

    @rule(
        stem=st.integers(0, 5),
        lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
        changed=st.none() | st.integers(0, 70),
        max_new_tokens=st.integers(1, 40),
        salt=st.sampled_from([b"", b"", b"", b"other"]),
        num_forks=st.just(0) | st.integers(1, 4),
        prompt_logprobs=st.sampled_from([False, False, True]),
        guided=st.booleans(),
    )
    def add(
        self,
        stem: int,
        lengths: list[int],
        changed: int | None,
        max_new_tokens: int,
        salt: bytes,
        num_forks: int,
        prompt_logprobs: bool,
        guided: bool,
    ) -> None:
        """Prefixes of one of two stems or of a finished text, perhaps with another token."""
        driver, room = self.driver, self.driver.num_blocks * BLOCK_SIZE
        stems = [prompt(70), prompt(70, 1), *(seq.token_ids for seq in driver.finished[-4:])]
        for length in lengths:
            tokens = stems[stem % len(stems)][: min(length, room - 1)]
            if changed is not None and changed < len(tokens):
                tokens[changed] = 3
            num_tokens = min(max_new_tokens, room - len(tokens))
            driver.add(tokens, num_tokens, salt, num_forks, prompt_logprobs, guided)

    @rule(num_steps=st.integers(1, 20))
    def run_steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.driver.step()

    @precondition(lambda self: not self.driver.pipeline.is_isolating)
    @precondition(lambda self: not self.driver.device.has_failed)
    @precondition(lambda self: len(self.driver.in_flight) < MAX_IN_FLIGHT)
    @rule()
    def launch(self) -> None:
        self.driver.launch()

    @precondition(lambda self: self.driver.in_flight)
    @rule()
    def collect(self) -> None:
        self.driver.collect()

    @precondition(lambda self: self.driver.live)
    @rule(index=st.integers(0, 30))
    def abort(self, index: int) -> None:
        self.driver.abort(self.driver.live[index % len(self.driver.live)])

    @precondition(lambda self: any(seq.constraint for seq in self.driver.live))
    @rule(index=st.integers(0, 30), num_tokens=st.integers(2, 30))
    def force(self, index: int, num_tokens: int) -> None:
        guided = [seq for seq in self.driver.live if seq.constraint is not None]
        self.driver.force(guided[index % len(guided)], num_tokens)

    @precondition(lambda self: self.driver.in_flight)
    @rule(isolate=st.booleans())
    def lose_a_step(self, isolate: bool) -> None:
        self.driver.lose(isolate)

    @rule()
    def fail_a_launch(self) -> None:
        """The next launch fails before the device sees it, if there is anything to launch."""
        self.driver.device.fails_next = True
        self.driver.step()
        self.driver.device.fails_next = False

    def teardown(self) -> None:
        """Whatever happened, everything that is left runs to its end."""
        if hasattr(self, "driver"):
            self.driver.drain()


class ThoroughSchedulerMachine(SchedulerMachine):
    pass


class TestRandomSchedules(SchedulerMachine.TestCase):
    settings = settings(
        max_examples=20,
        stateful_step_count=40,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],
    )


@pytest.mark.slow
@pytest.mark.thorough
class TestManyRandomSchedules(ThoroughSchedulerMachine.TestCase):
    settings = settings(
        max_examples=600 * THOROUGH,
        stateful_step_count=60,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],
    )
