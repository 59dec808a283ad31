"""Arrays come out of the one buffer as they went in, wherever the buffer is copied to."""

import pickle

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.device.packed_arrays import PackedArrays

dtypes = st.sampled_from([np.int64, np.int32, np.float32])
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
def test_arrays_come_out_of_a_copy_as_they_went_in(packed: dict[str, np.ndarray]) -> None:
    whole = PackedArrays(packed)
    copy = whole.buffer.clone()
    assert len(copy) == whole.max_bytes
    views = whole.unpack(copy)
    assert list(views) == list(packed)
    for name, array in packed.items():
        assert views[name].shape == array.shape
        assert torch.equal(views[name], torch.from_numpy(array))


@given(arrays(), st.integers(0, 5))
def test_pickled_arrays_come_out_as_they_went_in(packed: dict[str, np.ndarray], more: int) -> None:
    capacity = len(packed[next(reversed(packed))]) + more
    whole = pickle.loads(pickle.dumps(PackedArrays(packed, capacity or None)))
    room = torch.zeros(whole.max_bytes, dtype=torch.uint8)
    whole.copy_to(room)
    for name, view in whole.unpack(room).items():
        assert torch.equal(view[: len(packed[name])], torch.from_numpy(packed[name]))


@given(arrays(), st.integers(0, 20))
def test_the_last_array_has_room_to_grow(packed: dict[str, np.ndarray], more: int) -> None:
    last = next(reversed(packed))
    capacity = len(packed[last]) + more
    whole = PackedArrays(packed, capacity or None)
    room = torch.zeros(whole.max_bytes, dtype=torch.uint8)
    whole.copy_to(room)
    view = whole.unpack(room)[last]
    assert len(view) == capacity
    assert torch.equal(view[: len(packed[last])], torch.from_numpy(packed[last]))


@given(arrays())
def test_every_array_starts_where_a_vector_load_can(packed: dict[str, np.ndarray]) -> None:
    whole = PackedArrays(packed)
    room = torch.zeros(whole.max_bytes + 16, dtype=torch.uint8)
    start = -room.data_ptr() % 16
    views = whole.unpack(room[start : start + whole.max_bytes])
    assert all(view.data_ptr() % 16 == 0 for view in views.values() if view.numel())
