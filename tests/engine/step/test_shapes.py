"""Which shapes of steps are captured."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.step.graphs import shapes_for, sizes_for


@given(st.integers(1, 2000))
def test_every_number_of_decodes_has_a_graph_that_it_fills_well(num_rows: int) -> None:
    size = next(size for size in sizes_for(2000) if size >= num_rows)
    assert num_rows > size / 2 or size <= 8
    assert size - num_rows <= max(size / 5, 16)
    assert num_rows <= 256 or size - num_rows <= size / 8


@pytest.mark.parametrize("max_sequences", [1, 8, 100, 256, 257, 300, 512, 1000])
def test_the_largest_decodes_have_a_graph_too(max_sequences: int) -> None:
    sizes = sizes_for(max_sequences)
    assert sizes[-1] >= max_sequences
    assert list(sizes) == sorted(set(sizes))
    assert all(size < max_sequences for size in sizes[:-1])


@given(st.integers(1, 600), st.sampled_from([16, 64, 300, 2048, 8192]))
def test_no_graph_samples_more_rows_than_there_are_sequences(
    max_sequences: int, max_batch_tokens: int
) -> None:
    shapes = shapes_for(max_sequences, max_batch_tokens)
    mixed = [shape for shape in shapes if shape.prefills]
    assert all(shape.rows == min(shape.tokens, max_sequences) for shape in mixed)
    assert all(shape.rows == shape.tokens for shape in shapes if not shape.prefills)
    assert max(shape.tokens for shape in mixed) <= max_batch_tokens


def test_steps_of_up_to_2048_tokens_beside_decodes_fill_two_thirds_of_a_graph() -> None:
    tokens = [shape.tokens for shape in shapes_for(256, 8192) if shape.prefills]
    assert tokens[-1] == 2048
    assert set(range(512, 2049, 256)) <= set(tokens), "what chunks of long prompts fill"
    above_256 = [(less, size) for less, size in pairwise(tokens) if less > 255]
    assert all(less >= size * 2 / 3 for less, size in above_256)
