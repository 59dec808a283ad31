"""Arrays come out of the one buffer as they went in, wherever the buffer is copied to."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.device.packed_arrays import PackedArrays

dtypes = st.sampled_from([np.int64, np.int32])
shapes = st.one_of(st.tuples(st.integers(0, 9)), st.tuples(st.integers(0, 5), st.just(6)))


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    kinds = [((3,), np.int64), *draw(st.lists(st.tuples(shapes, dtypes), max_size=6))]
    return {
        f"array-{i}": rng.integers(-(2**31), 2**31, size=shape).astype(dtype)
        for i, (shape, dtype) in enumerate(kinds)
    }


@given(arrays())
def test_what_goes_in_comes_out(packed: dict[str, np.ndarray]) -> None:
    whole = PackedArrays(packed)
    copy = whole.buffer.clone()
    assert len(copy) == whole.max_bytes
    for name, array in packed.items():
        view = whole.view(copy, name)
        assert view.shape == array.shape
        assert torch.equal(view, torch.from_numpy(array))


@given(arrays(), st.integers(0, 20))
def test_the_last_array_has_room_to_grow(packed: dict[str, np.ndarray], more: int) -> None:
    last = next(reversed(packed))
    capacity = len(packed[last]) + more
    whole = PackedArrays(packed, capacity or None)
    room = torch.zeros(whole.max_bytes, dtype=torch.uint8)
    room[: len(whole.buffer)] = whole.buffer
    view = whole.view(room, last)
    assert len(view) == capacity
    assert torch.equal(view[: len(packed[last])], torch.from_numpy(packed[last]))


@given(arrays())
def test_every_array_starts_where_a_vector_load_can(packed: dict[str, np.ndarray]) -> None:
    whole = PackedArrays(packed)
    room = torch.zeros(whole.max_bytes + 16, dtype=torch.uint8)
    start = -room.data_ptr() % 16
    room = room[start : start + whole.max_bytes]
    assert all(whole.view(room, n).data_ptr() % 16 == 0 for n, a in packed.items() if a.size)
