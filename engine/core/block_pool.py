"""Who holds which KV block, and which blocks can be shared.

Ids only: the pool never sees a tensor or a sequence. Every block is in one of three
states, and `check_integrity` proves that they add up:

    used     referenced by one or more block tables
    cached   referenced by nobody, but full, hashed and findable: content is kept
    free     referenced by nobody and holding nothing worth finding

An idle block is reused in this order: free ones first, then cached ones, least
recently released first, so a prefix stays findable for as long as memory allows.
"""

import os
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Seq
from hashlib import blake2b

from engine.core.config import BLOCK_SIZE

BlockHash = bytes


class BlockHasher:
    """Chained hashes of full blocks.

    The hash of a block covers its tokens and, through its parent, everything before
    it, so equal hashes mean equal prefixes. Each chain starts from the identity's salt under
    a key drawn anew in each process: nobody can compute the first hash of another's chain,
    nor, without it, any behind it.
    """

    def __init__(self, key: bytes | None = None):
        self._key = key or os.urandom(32)

    def root(self, salt: bytes) -> BlockHash:
        """The parent of a sequence's first block."""
        return blake2b(salt, digest_size=16, key=self._key).digest()

    def chain(self, parent: BlockHash, token_ids: Seq[int]) -> list[BlockHash]:
        """Of the blocks that these tokens fill, one behind the other, the first behind `parent`.

        A block's ids and its parent are what blake2b takes in at once: a long prompt that is
        cached already costs little but this.
        """
        ids = array("I", token_ids)
        data, size = ids.tobytes(), ids.itemsize * BLOCK_SIZE
        hashes = []
        for start in range(0, len(data) - size + 1, size):
            parent = blake2b(parent + data[start : start + size], digest_size=16).digest()
            hashes.append(parent)
        return hashes


class BlockPool:
    """Reference-counted blocks 0 .. num_blocks-1 with a prefix index over the full ones."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        # Ordered for reuse: popped from the front.
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_idle(self) -> int:
        """Blocks that `allocate` can hand out: free and cached ones."""
        return len(self._idle)

    @property
    def num_cached(self) -> int:
        return sum(1 for block in self._idle if self._hash_of[block] is not None)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks whose content is now the caller's to write.

        The caller has checked `num_idle`; cached blocks taken here are forgotten.
        """
        assert count <= len(self._idle), "allocate more blocks than are idle"
        return [self._take_idle() for _ in range(count)]

    def _take_idle(self) -> int:
        block, _ = self._idle.popitem(last=False)
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None
        self._ref_counts[block] = 1
        return block

    def find(self, hashes: Seq[BlockHash]) -> list[int]:
        """The blocks that hold the first of these prefixes, up to one that none holds. Does not
        take a reference.
        """
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_idle(self, blocks: Seq[int]) -> int:
        """How many of these different blocks nobody references."""
        return [self._ref_counts[block] for block in blocks].count(0)

    def share(self, blocks: list[int]) -> None:
        """Take one more reference to each of these findable blocks."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._idle[block]
            self._ref_counts[block] += 1

    def register(self, block: int, block_hash: BlockHash) -> None:
        """Make a used block findable. Its content must be complete on the device.

        Where two sequences computed the same prefix at once, the first stays the
        findable one and the other remains private.
        """
        assert self._ref_counts[block] > 0, "register a block nobody holds"
        if self._hash_of[block] is None and block_hash not in self._block_of:
            self._hash_of[block] = block_hash
            self._block_of[block_hash] = block

    def release(self, blocks: list[int]) -> None:
        """Give back one reference to each block of a table.

        Walks the table from its end: a prefix is useful without its tail but not the
        other way round, so the tail must be the first to be reused.
        """
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, "release a block nobody holds"
            if self._ref_counts[block] == 0:
                self._idle[block] = None
                if self._hash_of[block] is None:
                    self._idle.move_to_end(block, last=False)

    def forget_cached(self) -> None:
        """Drop the whole prefix index; blocks in use stay in use, privately."""
        for block in self._block_of.values():
            self._hash_of[block] = None
        self._block_of.clear()

    def check_integrity(self, block_tables: list[list[int]]) -> None:
        """Raise AssertionError unless the books balance against these tables."""
        expected = [0] * self.num_blocks
        for table in block_tables:
            assert len(set(table)) == len(table), "a block twice in one table"
            for block in table:
                expected[block] += 1
        assert expected == self._ref_counts, "reference counts differ from the tables"
        idle = {block for block, count in enumerate(expected) if count == 0}
        assert idle == set(self._idle), "idle blocks differ from the unreferenced"
        findable = {h: b for b, h in enumerate(self._hash_of) if h is not None}
        assert findable == self._block_of, "prefix index differs from the blocks' hashes"
