"""A model of the allocator that torch has on a GPU, and a recorder of what it is asked for.

It has the parts that decide how much memory is reserved beyond what is allocated: pools of small
and of large blocks, segments, the best fit among free blocks, splitting, merging with free
neighbours, and giving back what is free. `expandable` is PYTORCH_ALLOC_CONF's expandable_segments:
one segment for each pool, of which pages are mapped and unmapped.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

_MIB = 1 << 20
_UNIT = 512
_SMALL = _MIB
"""The largest block of the small pool."""

Event = tuple[int, int | None]
"""(which block, its bytes), or None for the bytes where it is freed. One of no bytes takes none."""


@dataclass(eq=False)
class _Block:
    start: int
    size: int
    free: bool = True


@dataclass(eq=False)
class _Segment:
    blocks: list[_Block]
    large: bool
    unmapped: int = 0
    """Bytes of an expandable segment that were given back."""

    @property
    def size(self) -> int:
        return sum(block.size for block in self.blocks)


@dataclass
class CachingAllocator:
    expandable: bool
    segments: list[_Segment] = field(default_factory=list)
    taken: dict[int, tuple[_Segment, _Block]] = field(default_factory=dict)

    @property
    def reserved(self) -> int:
        return sum(segment.size - segment.unmapped for segment in self.segments)

    @property
    def allocated(self) -> int:
        return sum(block.size for _, block in self.taken.values())

    def run(self, events: Iterable[Event]) -> None:
        for number, size in events:
            if size:
                self.allocate(number, size)
            elif number in self.taken:
                self.release(number)

    def allocate(self, number: int, num_bytes: int) -> None:
        size = -(-num_bytes // _UNIT) * _UNIT
        large = size > _SMALL
        fitting = [
            (block.size, block.start, segment, block)
            for segment in self.segments
            if segment.large == large
            for block in segment.blocks
            if block.free and block.size >= size
        ]
        if fitting:
            _, _, segment, block = min(fitting, key=lambda found: found[:2])
        else:
            segment, block = self._grow(size, large)
        rest = block.size - size
        if rest > _SMALL if large and not self.expandable else rest >= _UNIT:
            block.size = size
            index = segment.blocks.index(block)
            segment.blocks.insert(index + 1, _Block(block.start + size, rest))
        block.free = False
        self.taken[number] = segment, block

    def _grow(self, size: int, large: bool) -> tuple[_Segment, _Block]:
        if not self.expandable:
            block = _Block(0, _segment_size(size, large))
            self.segments.append(_Segment([block], large))
            return self.segments[-1], block
        segment = next((found for found in self.segments if found.large == large), None)
        if segment is None:
            segment = _Segment([], large)
            self.segments.append(segment)
        if not segment.blocks or not segment.blocks[-1].free:
            segment.blocks.append(_Block(segment.size, 0))
        last, page = segment.blocks[-1], _page(large)
        last.size += -(-(size - last.size) // page) * page
        return segment, last

    def release(self, number: int) -> None:
        segment, block = self.taken.pop(number)
        block.free = True
        index = segment.blocks.index(block)
        for left in (index, index - 1):
            if left >= 0 and all(block.free for block in segment.blocks[left : left + 2]):
                merged = segment.blocks[left : left + 2]
                segment.blocks[left : left + 2] = [
                    _Block(merged[0].start, sum(block.size for block in merged))
                ]

    def empty_cache(self) -> None:
        """Give back segments that are free as a whole, or all pages that are."""
        if not self.expandable:
            self.segments = [s for s in self.segments if not all(b.free for b in s.blocks)]
        for segment in self.segments if self.expandable else ():
            page = _page(segment.large)
            segment.unmapped = sum(
                max((block.start + block.size) // page - -(-block.start // page), 0) * page
                for block in segment.blocks
                if block.free
            )


def _segment_size(size: int, large: bool) -> int:
    if not large:
        return 2 * _MIB
    return 20 * _MIB if size < 10 * _MIB else -(-size // (2 * _MIB)) * 2 * _MIB


def _page(large: bool) -> int:
    return 20 * _MIB if large else 2 * _MIB


class Recorder(TorchDispatchMode):
    """Records storages of tensors of one type on the meta device: when each is made, and when
    nothing refers to it any more.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self.events: list[Event] = []
        self._alive: dict[int, tuple[int, StorageWeakRef]] = {}
        self._num_made = 0
        self.is_on = False

    def __enter__(self) -> Self:
        self.is_on = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.is_on = False
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note_freed()
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if tensor.is_meta and tensor.dtype is self._dtype:
                self._note_made(tensor.untyped_storage())
        return result

    def _note_made(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = self._num_made, StorageWeakRef(storage)
            self.events.append((self._num_made, storage.nbytes()))
            self._num_made += 1

    def note_freed(self) -> None:
        for address, (number, reference) in list(self._alive.items()):
            if reference.expired():
                del self._alive[address]
                self.events.append((number, None))


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    for part in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(part, torch.Tensor):
            yield part
