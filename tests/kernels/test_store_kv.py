"""Keys and values reach their slots, whatever their strides, and nothing else is touched;
queries and keys are rotated to the last bit as transformers' families do it.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.ops import RotaryStoreKv, StoreKv
from kernels.store_kv import (
    Rotary,
    rotary_store_kv_torch,
    rotary_store_kv_triton,
    rotate,
    store_kv_torch,
    store_kv_triton,
)
from tests.kernels.rounding import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
E4M3 = torch.float8_e4m3fn

each_store = pytest.mark.parametrize("store_kv", [store_kv_torch, store_kv_triton])
each_rotary_store = pytest.mark.parametrize(
    "rotary_store_kv", [rotary_store_kv_torch, rotary_store_kv_triton]
)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with DEVICE:
        torch.manual_seed(0)
        yield


# -- where keys and values go ----------------------------------------------------------------


def make_caches(
    num_blocks: int, block_size: int, num_heads: int, head_dim: int, value_dim: int
) -> tuple[Tensor, Tensor]:
    shape = num_blocks, block_size, num_heads
    return torch.full((*shape, head_dim), torch.nan), torch.full((*shape, value_dim), -torch.inf)


def check_stored(cache: Tensor, before: Tensor, slots: Tensor, stored: Tensor) -> None:
    """Check that `cache` is `before`, with the rows of non-negative slots stored."""
    flat, expected = cache.flatten(0, 1).float(), before.clone().flatten(0, 1).float()
    for slot, row in zip(slots.tolist(), stored, strict=True):
        if slot >= 0:
            expected[slot] = row
    assert torch.equal(flat.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


@pytest.mark.slow
@each_store
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 16), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from(DTYPES), st.data(),
)  # fmt: skip
def test_any_slots_in_any_order(
    store_kv: StoreKv,
    num_blocks: int,
    block_size: int,
    num_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    keys, values = make_caches(num_blocks, block_size, num_heads, head_dim, value_dim)
    caches = keys.to(dtype), values.to(dtype)
    before = [cache.clone() for cache in caches]
    order = data.draw(st.permutations(range(num_blocks * block_size)))
    slots = torch.tensor(order[: data.draw(st.integers(1, len(order)))])
    slots[torch.tensor([data.draw(st.integers(0, 9)) == 0 for _ in slots])] = -1
    key = torch.randn(len(slots), num_heads, head_dim).to(dtype)
    value = torch.randn(len(slots), num_heads, value_dim).to(dtype)
    store_kv(key, value, *caches, slots)
    check_stored(caches[0], before[0], slots, key)
    check_stored(caches[1], before[1], slots, value)


@each_store
@pytest.mark.parametrize("slots", [[-1], [-1, -7, -1], [-1, 0, -1], [5, -1, 0], [-1, -1, 11, 3]])
def test_a_row_with_a_negative_slot_is_not_stored(store_kv: StoreKv, slots: list[int]) -> None:
    """The row may hold anything."""
    caches = make_caches(3, 4, 2, 5, 3)
    before = [cache.clone() for cache in caches]
    key, value = torch.randn(len(slots), 2, 5), torch.randn(len(slots), 2, 3)
    key[torch.tensor(slots) < 0] = torch.nan
    value[torch.tensor(slots) < 0] = torch.inf
    store_kv(key, value, *caches, torch.tensor(slots))
    check_stored(caches[0], before[0], torch.tensor(slots), key)
    check_stored(caches[1], before[1], torch.tensor(slots), value)


def strided(kind: str, num_tokens: int, num_heads: int, dim: int) -> Tensor:
    """Return a tensor [num_tokens, num_heads, dim] with the strides that models produce."""
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


KINDS = [
    "heads first",
    "part of a fused projection",
    "head by head interleaved",
    "one head for all",
    "every other token",
]


@pytest.mark.parametrize(
    ("store_kv", "kind"),
    [(store, kind) for store in (store_kv_torch, store_kv_triton) for kind in KINDS]
    + [(store_kv_torch, "dim first")],
)
@pytest.mark.parametrize("num_tokens", [1, 11])
def test_inputs_may_have_any_strides(store_kv: StoreKv, kind: str, num_tokens: int) -> None:
    caches = make_caches(3, 8, 2, 6, 10)
    before = [cache.clone() for cache in caches]
    slots = torch.randperm(24)[:num_tokens]
    key, value = strided(kind, num_tokens, 2, 6), strided(kind, num_tokens, 2, 10)
    key_before, value_before = key.clone(), value.clone()
    store_kv(key, value, *caches, slots)
    check_stored(caches[0], before[0], slots, key_before)
    check_stored(caches[1], before[1], slots, value_before)


@each_store
def test_a_layer_of_a_shared_tensor_leaves_the_others_alone(store_kv: StoreKv) -> None:
    keys, values = torch.zeros(3, 2, 4, 1, 5), torch.zeros(3, 2, 4, 1, 5)
    key, value = torch.ones(2, 1, 5), torch.ones(2, 1, 5)
    store_kv(key, value, keys[1], values[1], torch.tensor([6, 1]))
    for stored in (keys, values):
        assert stored[1].sum() == 10
        assert stored[[0, 2]].sum() == 0
        assert stored[1, 1, 2].sum() == stored[1, 0, 1].sum() == 5


@each_store
def test_a_slot_may_be_overwritten(store_kv: StoreKv) -> None:
    caches = make_caches(1, 4, 1, 2, 2)
    for n in range(3):
        rows = torch.full((1, 1, 2), float(n))
        store_kv(rows, -rows, *caches, torch.tensor([2]))
    assert caches[0][0, 2, 0].tolist() == [2.0, 2.0]
    assert caches[1][0, 2, 0].tolist() == [-2.0, -2.0]


@each_store
@pytest.mark.parametrize("num_kv_heads", [1, 9, 40])
def test_heads_may_need_several_programs(store_kv: StoreKv, num_kv_heads: int) -> None:
    caches = make_caches(1, 4, num_kv_heads, 128, 200)
    before = [cache.clone() for cache in caches]
    slots = torch.tensor([3, 0])
    key, value = torch.randn(2, num_kv_heads, 128), torch.randn(2, num_kv_heads, 200)
    store_kv(key, value, *caches, slots)
    check_stored(caches[0], before[0], slots, key)
    check_stored(caches[1], before[1], slots, value)


# -- caches in float8 ------------------------------------------------------------------------


def float8_caches(num_heads: int, head_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
    shape = 2, 16, num_heads
    return torch.zeros(*shape, head_dim).to(E4M3), torch.zeros(*shape, value_dim).to(E4M3)


@each_store
@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_holds_each_head_over_its_scale(store_kv: StoreKv, dtype: torch.dtype) -> None:
    caches = float8_caches(3, 20, 8)
    k_scale, v_scale = torch.tensor([0.1, 1.0, 3.0]), torch.tensor([2.0, 0.3, 0.01])
    key, value = torch.randn(4, 3, 20).to(dtype), torch.randn(4, 3, 8).to(dtype)
    slots = torch.tensor([31, -1, 4, 0])
    store_kv(key, value, *caches, slots, k_scale, v_scale)
    for cache, rows, scale in zip(caches, (key, value), (k_scale, v_scale), strict=True):
        scaled = (rows.float() / scale[:, None]).clamp(-448, 448)
        check_stored(cache, torch.zeros(cache.shape), slots, scaled.to(E4M3).float())
        read = cache.flatten(0, 1)[slots.clamp(min=0)].float()
        # Three bits of fraction, and steps of 2^-9 near zero.
        allowed = scaled.abs() * 2**-4 + 2**-10
        assert ((read - scaled).abs() <= allowed)[slots >= 0].all()


@each_store
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_every_number_of_16_bits_is_rounded_to_float8_as_torch_does(
    store_kv: StoreKv, dtype: torch.dtype
) -> None:
    """Numbers and infinities round to nearest even and saturate at 448; NaN stays NaN."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    every[every.isnan()] = torch.nan
    rows = every.view(1, 64, 1024)
    caches = float8_caches(64, 1024, 1024)
    one = torch.ones(64)
    store_kv(rows, rows, *caches, torch.tensor([5]), one, one)
    stored = caches[0].view(torch.uint8)[0, 5].flatten()
    expected = every.float().clamp(-448, 448).to(E4M3).view(torch.uint8)
    is_nan = every.isnan()
    assert torch.equal(stored[~is_nan], expected[~is_nan])
    assert (stored[is_nan] & 0x7F == 0x7F).all()


@each_store
def test_halves_between_two_float8_go_to_the_even_one(store_kv: StoreKv) -> None:
    codes = torch.arange(0x7E, dtype=torch.uint8)
    halfway = (codes.view(E4M3).float() + (codes + 1).view(E4M3).float()) / 2
    caches = float8_caches(1, len(codes), len(codes))
    store_kv(*(halfway[None, None],) * 2, *caches, torch.tensor([0]), torch.ones(1), torch.ones(1))
    for cache in caches:
        assert torch.equal(cache.view(torch.uint8)[0, 0, 0], codes + codes % 2)


# -- rotation --------------------------------------------------------------------------------

Apply = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def of_model(name: str) -> Apply:
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    if name == "gptj":  # [1, T, heads, dim], and one tensor at a time
        return lambda q, k, cos, sin: tuple(
            module.apply_rotary_pos_emb(x.transpose(1, 2), sin, cos).transpose(1, 2) for x in (q, k)
        )
    return module.apply_rotary_pos_emb


# Model, how its `Rotary` reads, whether its tables are float32, and share of the head rotated.
FAMILIES: list[tuple[str, dict[str, Any], bool, float]] = [
    ("llama", {"interleaved": False}, False, 1),
    ("qwen3", {"interleaved": False}, False, 1),
    ("gemma2", {"interleaved": False}, False, 1),
    ("phi3", {"interleaved": False}, False, 0.75),
    ("gpt_neox", {"interleaved": False}, False, 0.25),
    ("olmo", {"interleaved": False}, True, 1),
    ("olmo2", {"interleaved": False}, True, 1),
    ("gpt_oss", {"interleaved": False, "tables": "pairs"}, False, 1),
    ("glm", {"interleaved": True}, False, 0.5),
    ("glm4", {"interleaved": True}, False, 0.5),
    ("helium", {"interleaved": True}, False, 1),
    ("ernie4_5", {"interleaved": True}, True, 1),
    ("blt", {"interleaved": True, "tables": "repeated"}, False, 1),
    ("cohere", {"interleaved": True, "tables": "repeated", "in_float32": True}, False, 1),
    ("cohere2", {"interleaved": True, "tables": "repeated", "in_float32": True}, False, 1),
    ("gptj", {"interleaved": True, "tables": "pairs"}, False, 1),
]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0])


def make_tables(form: dict[str, Any], num_tokens: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """Return a model's tables, [1, num_tokens, columns], at random positions."""
    angles = torch.rand(1, num_tokens, rotary_dim // 2) * 50
    match form.get("tables", "halves"):
        case "halves":
            angles = torch.cat((angles, angles), dim=-1)
        case "repeated":
            angles = angles.repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


@each_rotary_store
@each_family
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.slow
def test_each_family_is_rotated_as_its_model_does(
    rotary_store_kv: RotaryStoreKv, family: tuple[str, dict[str, Any], bool, float], dtype: Any
) -> None:
    name, form, float32_tables, share = family
    head_dim, value_dim, num_tokens, slots = 24, 10, 5, torch.tensor([7, 0, -1, 30, 16])
    query, key = torch.randn(1, 6, 5, head_dim).to(dtype), torch.randn(1, 3, 5, head_dim).to(dtype)
    value = torch.randn(5, 3, value_dim).to(dtype)
    cos, sin = (
        table.to(torch.float32 if float32_tables else dtype)
        for table in make_tables(form, num_tokens, int(head_dim * share))
    )
    expected_query, expected_key = of_model(name)(query, key, cos, sin)
    keys, values = make_caches(2, 16, 3, head_dim, value_dim)
    caches = keys.to(dtype), values.to(dtype)
    before = [cache.clone() for cache in caches]
    rotary = Rotary(cos[0], sin[0], **form)
    rotated = rotary_store_kv(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value, rotary, *caches, slots
    )
    assert rotated.is_contiguous()
    assert rotated.dtype == dtype
    assert torch.equal(rotated, expected_query[0].transpose(0, 1).to(dtype))
    check_stored(caches[0], before[0], slots, expected_key[0].transpose(0, 1).to(dtype))
    check_stored(caches[1], before[1], slots, value)


@each_rotary_store
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_product_is_rounded_unless_the_tables_are_float32(
    rotary_store_kv: RotaryStoreKv, dtype: torch.dtype
) -> None:
    """`in_float32` has the effect of float32 tables, and shows in many elements."""
    query = torch.randn(20, 2, 64).to(dtype)
    cos, sin = (table[0].to(dtype) for table in make_tables({}, 20, 64))
    caches, slots = make_caches(1, 16, 2, 64, 64), torch.zeros(20, dtype=torch.int64)
    by_type, in_float32, float32_tables = (
        rotary_store_kv(query, None, None, rotary, *caches, slots)
        for rotary in (
            Rotary(cos, sin, False),
            Rotary(cos, sin, False, in_float32=True),
            Rotary(cos.float(), sin.float(), False),
        )
    )
    assert torch.equal(in_float32, float32_tables)
    assert (by_type != in_float32).float().mean() > 0.1


@each_rotary_store
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_query_alone_leaves_the_caches_as_they_are(
    rotary_store_kv: RotaryStoreKv, interleaved: bool
) -> None:
    query = torch.randn(3, 2, 16)
    cos, sin = make_tables({}, 3, 12)
    rotary = Rotary(cos[0], sin[0], interleaved)
    caches = make_caches(1, 16, 1, 16, 16)
    before = [cache.clone() for cache in caches]
    rotated = rotary_store_kv(query, None, None, rotary, *caches, torch.tensor([1, 2, 3]))
    assert torch.equal(rotated, rotate(query, rotary))
    assert torch.equal(rotated[..., 12:], query[..., 12:])
    for cache, untouched in zip(caches, before, strict=True):
        assert torch.equal(cache.nan_to_num(7, 8, 9), untouched.nan_to_num(7, 8, 9))


@each_rotary_store
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rotated_inputs_may_have_any_strides(
    rotary_store_kv: RotaryStoreKv, interleaved: bool, kind: str
) -> None:
    query, key, value = (strided(kind, 7, n, 16) for n in (6, 2, 2))
    cos, sin = (table[0].repeat(1, 2)[::2, :12] for table in make_tables({}, 14, 12))
    assert not cos.is_contiguous()
    rotary = Rotary(cos, sin, interleaved)
    caches = make_caches(1, 16, 2, 16, 16)
    before = [cache.clone() for cache in caches]
    slots = torch.randperm(16)[:7]
    rotated = rotary_store_kv(query, key, value, rotary, *caches, slots)
    assert torch.equal(rotated, rotate(query.clone(), rotary))
    check_stored(caches[0], before[0], slots, rotate(key.clone(), rotary))
    check_stored(caches[1], before[1], slots, value)


@each_rotary_store
def test_a_key_is_rounded_to_its_type_before_float8(rotary_store_kv: RotaryStoreKv) -> None:
    query, key, value = (torch.randn(9, n, 32).bfloat16() for n in (4, 2, 2))
    cos, sin = make_tables({}, 9, 32)
    rotary = Rotary(cos[0].bfloat16(), sin[0].bfloat16(), interleaved=False)
    caches, scale = float8_caches(2, 32, 32), torch.tensor([0.02, 0.7])
    slots = torch.arange(9)
    rotary_store_kv(query, key, value, rotary, *caches, slots, scale, scale)
    for cache, rows in zip(caches, (rotate(key, rotary), value), strict=True):
        expected = (rows.float() / scale[:, None]).clamp(-448, 448).to(E4M3)
        assert torch.equal(cache[0, :9].view(torch.uint8), expected.view(torch.uint8))
