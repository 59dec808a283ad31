"""Keys and values reach their slots, whatever their strides, and nothing else is touched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.store_kv import store_kv

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_caches(
    num_blocks: int, block_size: int, num_heads: int, head_dim: int, value_dim: int
) -> tuple[Tensor, Tensor]:
    shape = num_blocks, block_size, num_heads
    return torch.full((*shape, head_dim), torch.nan), torch.full((*shape, value_dim), -torch.inf)


def check_stored(cache: Tensor, before: Tensor, slots: Tensor, stored: Tensor) -> None:
    flat, expected = cache.flatten(0, 1), before.clone().flatten(0, 1)
    for slot, row in zip(slots.tolist(), stored, strict=True):
        expected[slot] = row
    assert torch.equal(flat.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 16), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from(DTYPES), st.data(),
)  # fmt: skip
def test_any_slots_in_any_order(
    num_blocks: int,
    block_size: int,
    num_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    caches = make_caches(num_blocks, block_size, num_heads, head_dim, value_dim)
    caches = tuple(cache.to(dtype) for cache in caches)
    before = [cache.clone() for cache in caches]
    order = data.draw(st.permutations(range(num_blocks * block_size)))
    slots = torch.tensor(order[: data.draw(st.integers(1, len(order)))])
    key = torch.randn(len(slots), num_heads, head_dim).to(dtype)
    value = torch.randn(len(slots), num_heads, value_dim).to(dtype)
    store_kv(key, value, *caches, slots)
    check_stored(caches[0], before[0], slots, key)
    check_stored(caches[1], before[1], slots, value)


def strided(kind: str, num_tokens: int, num_heads: int, dim: int) -> Tensor:
    """[num_tokens, num_heads, dim] as models hand it over."""
    match kind:
        case "heads first":  # [1, heads, T, dim] as transformers has it
            return torch.randn(1, num_heads, num_tokens, dim)[0].transpose(0, 1)
        case "part of a fused projection":
            return torch.randn(num_tokens, 3 * num_heads * dim)[:, num_heads * dim :].unflatten(
                1, (2 * num_heads, dim)
            )[:, :num_heads]
        case "head by head interleaved":  # GPT-NeoX: q, k and v of a head side by side
            return torch.randn(num_tokens, num_heads, 3 * dim)[..., dim : 2 * dim]
        case "one head for all":
            return torch.randn(num_tokens, 1, dim).expand(-1, num_heads, -1)
        case "dim first":
            return torch.randn(dim, num_heads, num_tokens).permute(2, 1, 0)
        case _:
            return torch.randn(2 * num_tokens, num_heads, dim)[::2]


@pytest.mark.parametrize(
    "kind",
    [
        "heads first",
        "part of a fused projection",
        "head by head interleaved",
        "one head for all",
        "dim first",
        "every other token",
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 11])
def test_strided_inputs(kind: str, num_tokens: int) -> None:
    torch.manual_seed(0)
    caches = make_caches(3, 8, 2, 6, 10)
    before = [cache.clone() for cache in caches]
    slots = torch.randperm(24)[:num_tokens]
    key, value = strided(kind, num_tokens, 2, 6), strided(kind, num_tokens, 2, 10)
    key_before, value_before = key.clone(), value.clone()
    store_kv(key, value, *caches, slots)
    check_stored(caches[0], before[0], slots, key_before)
    check_stored(caches[1], before[1], slots, value_before)


def test_a_layer_of_a_shared_tensor_leaves_the_others_alone() -> None:
    keys, values = torch.zeros(3, 2, 4, 1, 5), torch.zeros(3, 2, 4, 1, 5)
    key, value = torch.ones(2, 1, 5), torch.ones(2, 1, 5)
    store_kv(key, value, keys[1], values[1], torch.tensor([6, 1]))
    for stored in (keys, values):
        assert stored[1].sum() == 10
        assert stored[[0, 2]].sum() == 0
        assert stored[1, 1, 2].sum() == stored[1, 0, 1].sum() == 5


def test_what_was_stored_may_be_overwritten() -> None:
    caches = make_caches(1, 4, 1, 2, 2)
    for n in range(3):
        rows = torch.full((1, 1, 2), float(n))
        store_kv(rows, -rows, *caches, torch.tensor([2]))
    assert caches[0][0, 2, 0].tolist() == [2.0, 2.0]
    assert caches[1][0, 2, 0].tolist() == [-2.0, -2.0]
