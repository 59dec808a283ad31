"""Reference counts of the KV blocks, and the index of cached prefixes.

The pool knows block ids only; it never sees a tensor or a sequence. Every block is in one of
three states, and `check_integrity` proves that they add up:

    used     in one or more block tables
    cached   in no block table, but full, hashed and findable: its content is kept
    free     in no block table, and not findable

Free and cached blocks are idle: `allocate` may hand them out. Free blocks are reused first, then
the cached block that was released first, so a prefix stays findable as long as memory allows.
"""

import os
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Seq
from hashlib import blake2b

from engine.core.config import BLOCK_SIZE

BlockHash = bytes


class BlockHasher:
    """Computes chained hashes of full blocks.

    The hash of a block covers its tokens and, through its parent, everything before it, so equal
    hashes mean equal prefixes. Each chain starts from the identity's salt, hashed under a key that
    each process draws anew. Without that key the first hash of a chain cannot be computed, and
    without the first hash no later one.
    """

    def __init__(self, key: bytes | None = None):
        self._key = key or os.urandom(32)

    def root(self, salt: bytes) -> BlockHash:
        """The parent of a sequence's first block."""
        return blake2b(salt, digest_size=16, key=self._key).digest()

    def chain(self, parent: BlockHash, token_ids: Seq[int]) -> list[BlockHash]:
        """Return the hashes of the blocks that these tokens fill; `parent` precedes the first.

        The ids of a block and its parent fit into one blake2b compression. For a long prompt that
        is cached already, this is most of the cost.
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
        """Take `count` idle blocks for the caller to write to.

        The caller has checked `num_idle`. A cached block that is taken is no longer findable.
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
        """Return the cached or used blocks with these hashes, up to the first that is not found.

        Takes no references.
        """
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_idle(self, blocks: Seq[int]) -> int:
        """Count the idle blocks among these distinct blocks."""
        return [self._ref_counts[block] for block in blocks].count(0)

    def share(self, blocks: list[int]) -> None:
        """Add a reference to each of these findable blocks."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._idle[block]
            self._ref_counts[block] += 1

    def register(self, block: int, block_hash: BlockHash) -> None:
        """Make a used block findable. Its content must be complete on the device.

        If two sequences computed the same prefix at the same time, the block registered first
        stays the findable one and the other remains private.
        """
        assert self._ref_counts[block] > 0, "register a block that is not in use"
        if self._hash_of[block] is None and block_hash not in self._block_of:
            self._hash_of[block] = block_hash
            self._block_of[block_hash] = block

    def release(self, blocks: list[int]) -> None:
        """Drop one reference to each block of a block table.

        Releases the last block first, so that it is reused first: a prefix is useful without its
        tail, a tail is useless without its prefix.
        """
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, "release a block that is not in use"
            if self._ref_counts[block] == 0:
                self._idle[block] = None
                if self._hash_of[block] is None:
                    self._idle.move_to_end(block, last=False)

    def forget_cached(self) -> None:
        """Empty the prefix index. Blocks in use stay in use, but cannot be found any more."""
        for block in self._block_of.values():
            self._hash_of[block] = None
        self._block_of.clear()

    def check_integrity(self, block_tables: list[list[int]]) -> None:
        """Raise AssertionError unless the pool agrees with these block tables."""
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
