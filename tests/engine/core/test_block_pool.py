"""Which blocks are in use, which can be found by their hash, and which is evicted first."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.core.block_pool import BlockHash, BlockHasher, BlockPool
from engine.core.config import BLOCK_SIZE
from tests.thorough import THOROUGH


def hash_of(number: int) -> BlockHash:
    return number.to_bytes(16, "big")


def find(pool: BlockPool, number: int) -> int | None:
    blocks = pool.find([hash_of(number)])
    return blocks[0] if blocks else None


def extend(hasher: BlockHasher, parent: BlockHash, token_ids: list[int]) -> BlockHash:
    (block_hash,) = hasher.chain(parent, token_ids)
    return block_hash


def cache_tables(pool: BlockPool, *tables: list[int]) -> None:
    """Register each block under its own number, then release the tables in this order."""
    for table in tables:
        for block in table:
            pool.register(block, hash_of(block))
    for table in tables:
        pool.release(table)


class TestBlockHasher:
    def test_equal_chains_have_equal_hashes(self) -> None:
        hasher = BlockHasher()
        tokens = list(range(BLOCK_SIZE))
        first, second = (extend(hasher, hasher.root(b"salt"), tokens) for _ in range(2))
        assert first == second
        assert extend(hasher, first, tokens) == extend(hasher, second, tokens)

    @pytest.mark.parametrize("changed", range(BLOCK_SIZE))
    def test_the_hash_depends_on_every_token(self, changed: int) -> None:
        hasher = BlockHasher()
        tokens = [7] * BLOCK_SIZE
        other = [8 if i == changed else 7 for i in range(BLOCK_SIZE)]
        root = hasher.root(b"")
        assert extend(hasher, root, tokens) != extend(hasher, root, other)

    def test_the_hash_depends_on_all_32_bits_of_a_token_id(self) -> None:
        hasher = BlockHasher()
        root = hasher.root(b"")
        seen = {extend(hasher, root, [1 << bit] * BLOCK_SIZE) for bit in range(32)}
        assert len(seen) == 32

    def test_the_hash_depends_on_the_blocks_before(self) -> None:
        hasher = BlockHasher()
        tokens, root = [7] * BLOCK_SIZE, hasher.root(b"")
        second = extend(hasher, extend(hasher, root, tokens), tokens)
        other = extend(hasher, extend(hasher, root, [8] * BLOCK_SIZE), tokens)
        assert len({extend(hasher, root, tokens), second, other}) == 3

    def test_a_chain_can_be_extended_from_any_of_its_blocks(self) -> None:
        hasher = BlockHasher()
        tokens = list(range(3 * BLOCK_SIZE))
        whole = hasher.chain(hasher.root(b""), [*tokens, 1, 2, 3])
        assert len(whole) == 3
        assert hasher.chain(whole[0], tokens[BLOCK_SIZE:]) == whole[1:]
        assert hasher.chain(whole[0], tokens[: BLOCK_SIZE - 1]) == []

    def test_chains_of_different_salts_have_different_hashes(self) -> None:
        hasher = BlockHasher()
        tokens = [7] * BLOCK_SIZE
        roots = [hasher.root(salt) for salt in (b"", b"a", b"b")]
        assert len({extend(hasher, root, tokens) for root in roots}) == 3

    def test_hashes_are_keyed_with_a_secret_of_the_process(self) -> None:
        assert BlockHasher().root(b"") != BlockHasher().root(b"")
        assert BlockHasher(b"key").root(b"") == BlockHasher(b"key").root(b"")


class TestBlockPool:
    def test_every_block_is_allocated_once(self) -> None:
        pool = BlockPool(5)
        blocks = pool.allocate(2) + pool.allocate(3)
        assert sorted(blocks) == [0, 1, 2, 3, 4]
        assert (pool.num_used, pool.num_idle, pool.num_cached) == (5, 0, 0)
        pool.release(blocks)
        assert (pool.num_used, pool.num_idle, pool.num_cached) == (0, 5, 0)

    def test_a_block_is_found_only_after_it_was_registered(self) -> None:
        pool = BlockPool(1)
        (block,) = pool.allocate(1)
        assert find(pool, 1) is None
        pool.register(block, hash_of(1))
        assert find(pool, 1) == block

    def test_a_released_block_can_still_be_found(self) -> None:
        pool = BlockPool(3)
        cache_tables(pool, pool.allocate(2))
        assert (pool.num_used, pool.num_idle, pool.num_cached) == (0, 3, 2)
        assert find(pool, 0) == 0
        assert pool.count_idle([0]) == 1

    def test_a_shared_block_is_used_until_its_last_owner_releases_it(self) -> None:
        pool = BlockPool(2)
        table = pool.allocate(2)
        pool.register(table[0], hash_of(0))
        pool.share(table[:1])
        pool.release(table)
        assert pool.num_used == 1
        assert pool.count_idle([table[0]]) == 0
        pool.release(table[:1])
        assert pool.num_used == 0

    def test_a_cached_block_that_is_shared_again_is_not_evicted(self) -> None:
        pool = BlockPool(2)
        cache_tables(pool, pool.allocate(2))
        pool.share([1])
        assert (pool.num_used, pool.num_cached) == (1, 1)
        assert pool.allocate(1) == [0], "the shared block is not idle"
        assert find(pool, 1) == 1
        pool.release([0])
        pool.release([1])

    def test_free_blocks_are_reused_before_cached_ones(self) -> None:
        pool = BlockPool(4)
        first, second = pool.allocate(2), pool.allocate(2)
        cache_tables(pool, first)
        pool.release(second)
        assert set(pool.allocate(2)) == set(second)
        assert [find(pool, block) for block in first] == first

    def test_the_least_recently_released_block_is_evicted_first(self) -> None:
        pool = BlockPool(4)
        tables = [pool.allocate(1) for _ in range(4)]
        cache_tables(pool, tables[2], tables[0], tables[3], tables[1])
        assert [pool.allocate(1)[0] for _ in range(4)] == [2, 0, 3, 1]

    def test_a_block_that_was_shared_again_is_evicted_last(self) -> None:
        pool = BlockPool(3)
        tables = [pool.allocate(1) for _ in range(3)]
        cache_tables(pool, *tables)
        pool.share(tables[0])
        pool.release(tables[0])
        assert [pool.allocate(1)[0] for _ in range(3)] == [1, 2, 0]

    def test_the_tail_of_a_table_is_evicted_before_its_head(self) -> None:
        pool = BlockPool(3)
        cache_tables(pool, pool.allocate(3))
        pool.allocate(2)
        assert [find(pool, block) for block in range(3)] == [0, None, None]

    def test_an_evicted_block_is_not_found_and_can_be_registered_anew(self) -> None:
        pool = BlockPool(1)
        cache_tables(pool, pool.allocate(1))
        (block,) = pool.allocate(1)
        assert find(pool, 0) is None
        pool.register(block, hash_of(1))
        assert find(pool, 1) == block
        pool.release([block])
        assert pool.num_cached == 1

    def test_the_first_of_two_blocks_with_equal_content_is_found(self) -> None:
        pool = BlockPool(2)
        first, second = pool.allocate(2)
        pool.register(first, hash_of(9))
        pool.register(second, hash_of(9))
        assert find(pool, 9) == first
        pool.release([first])
        pool.release([second])
        assert pool.num_cached == 1
        assert pool.allocate(1) == [second], "the second block is free, not cached"

    def test_forget_cached_empties_the_cache_and_keeps_blocks_in_use(self) -> None:
        pool = BlockPool(3)
        table = pool.allocate(3)
        for block in table:
            pool.register(block, hash_of(block))
        pool.release(table[1:])
        pool.forget_cached()
        assert [find(pool, block) for block in table] == [None] * 3
        assert (pool.num_used, pool.num_cached) == (1, 0)
        pool.check_integrity([table[:1]])
        pool.release(table[:1])
        assert pool.num_cached == 0

    @pytest.mark.parametrize(
        "tables",
        [[], [[0]], [[0, 1], [1]], [[0, 1, 2]], [[0, 0, 1]], [[0], [2]]],
        ids=[
            "no tables",
            "block missing",
            "block shared",
            "not allocated",
            "listed twice",
            "wrong block",
        ],
    )
    def test_check_integrity_fails_when_tables_and_ref_counts_differ(
        self, tables: list[list[int]]
    ) -> None:
        pool = BlockPool(3)
        pool.allocate(2)
        with pytest.raises(AssertionError):
            pool.check_integrity(tables)

    def test_invalid_calls_raise_assertion_errors(self) -> None:
        pool = BlockPool(2)
        with pytest.raises(AssertionError):
            pool.allocate(3)
        with pytest.raises(AssertionError):
            pool.register(0, hash_of(0))
        with pytest.raises(AssertionError):
            pool.release([0])


class BlockPoolMachine(RuleBasedStateMachine):
    """Allocates, shares and releases tables, and compares the pool with a plain model of it."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.tables: list[list[int]] = []
        self.findable: dict[BlockHash, int] = {}
        self.cached: list[int] = []  # in order of eviction

    @property
    def used(self) -> set[int]:
        return {block for table in self.tables for block in table}

    def num_free(self) -> int:
        return self.pool.num_blocks - len(self.used) - len(self.cached)

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.pool.num_idle), "count")
        num_evicted = max(0, count - self.num_free())
        evicted, self.cached = self.cached[:num_evicted], self.cached[num_evicted:]
        free = set(range(self.pool.num_blocks)) - self.used - set(self.cached) - set(evicted)
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert [block for block in blocks if block not in free] == evicted
        self.findable = {h: b for h, b in self.findable.items() if b not in evicted}
        self.tables.append(blocks)

    @precondition(lambda self: self.findable)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = st.sampled_from(sorted(self.findable.values()))
        shared = data.draw(st.lists(blocks, min_size=1, unique=True), "blocks")
        self.pool.share(shared)
        self.cached = [block for block in self.cached if block not in shared]
        self.tables.append(shared)

    @precondition(lambda self: self.used)
    @rule(data=st.data(), number=st.integers(0, 20))
    def register(self, data: st.DataObject, number: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.used)), "block")
        self.pool.register(block, hash_of(number))
        if block not in self.findable.values():
            self.findable.setdefault(hash_of(number), block)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1), "table"))
        self.pool.release(table)
        held = self.used
        self.cached += [b for b in reversed(table) if b not in held and self.is_findable(b)]

    def is_findable(self, block: int) -> bool:
        return block in self.findable.values()

    @precondition(lambda self: len(self.cached) > 2)
    @rule()
    def forget_cached(self) -> None:
        self.pool.forget_cached()
        self.findable, self.cached = {}, []

    @invariant()
    def pool_equals_model(self) -> None:
        pool = self.pool
        pool.check_integrity(self.tables)
        assert pool.num_used == len(self.used)
        assert pool.num_cached == len(self.cached)
        assert pool.num_idle == len(self.cached) + self.num_free()
        for number in range(21):
            assert find(pool, number) == self.findable.get(hash_of(number))
        for block in range(pool.num_blocks):
            assert pool.count_idle([block]) == (block not in self.used)


class ThoroughBlockPoolMachine(BlockPoolMachine):
    pass


TestRandomUse = BlockPoolMachine.TestCase
TestRandomUse.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)

TestManyRandomUses = pytest.mark.slow(pytest.mark.thorough(ThoroughBlockPoolMachine.TestCase))
TestManyRandomUses.settings = settings(
    max_examples=400 * THOROUGH, stateful_step_count=60, deadline=None
)
