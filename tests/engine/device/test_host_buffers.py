"""Buffers of the host are used again, but never by two at once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.device.host_buffers import HostBuffer, HostBuffers, Staging

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 1 << 18), min_size=1, max_size=20))
def test_a_buffer_has_room_and_one_owner(sizes: list[int]) -> None:
    staging = Staging(HostBuffers(CPU))
    taken = [staging.take(size) for size in sizes]
    for size, buffer in zip(sizes, taken, strict=True):
        assert len(buffer.tensor) == len(buffer.array) >= size
    assert len({buffer.tensor.data_ptr() for buffer in taken}) == len(taken)


def test_the_tensor_and_the_array_are_the_same_memory() -> None:
    buffer = HostBuffers(CPU).take(9)
    buffer.array[3] = 7
    assert buffer.tensor[3] == 7


def test_the_next_step_gets_the_buffers_of_one_whose_result_was_read() -> None:
    buffers = HostBuffers(CPU)
    first = [taken(Staging(buffers), 100, release=True) for _ in range(5)]
    assert len({buffer.tensor.data_ptr() for buffer in first}) == 1


def test_steps_in_flight_have_buffers_of_their_own() -> None:
    buffers = HostBuffers(CPU)
    in_flight = [taken(Staging(buffers), 100, release=False) for _ in range(3)]
    assert len({buffer.tensor.data_ptr() for buffer in in_flight}) == 3


def taken(staging: Staging, size: int, release: bool) -> HostBuffer:
    buffer = staging.take(size)
    if release:
        staging.release()
        staging.release()  # once more changes nothing
    return buffer
