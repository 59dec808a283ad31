"""Paged attention compiles for every GPU, and fits its registers and shared memory."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kernels.paged_attention.mask import MaskSpec
from kernels.paged_attention.plan import block_q_for
from kernels.paged_attention.tuning import Variant, variant_for
from kernels.target import Target
from tests.kernels import compiling
from tests.kernels.compiling import SHARED_LIMIT, TARGETS, Resources, positions

EVERYTHING = MaskSpec()
BLOCK_SIZE = 16
NUM_SMS = 132
REGISTERS = 64 << 10
"""Registers of a multiprocessor."""


@dataclass(frozen=True)
class Layer:
    """A layer's shapes; `stack` bytes per thread may spill, for values outside of the loop."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    mask: MaskSpec = EVERYTHING
    softcap: float | None = None
    is_float8: bool = False
    has_sinks: bool = False
    stack: int = 0


LAYERS = {
    "Llama-3.1-8B": Layer(32, 8, 128, 128),
    "Llama-3.1-8B, float8 cache": Layer(32, 8, 128, 128, is_float8=True),
    "Gemma-2-9B, float8 cache": Layer(16, 8, 256, 256, is_float8=True),
    "Gemma-2-9B": Layer(16, 8, 256, 256, MaskSpec(window=4096), softcap=50.0),
    "Phi-3-mini": Layer(32, 32, 96, 96, MaskSpec(window=2047)),
    "DeepSeek-V2-Lite": Layer(16, 16, 192, 128),
    "Llama-4-Scout": Layer(40, 8, 128, 128, MaskSpec(chunk=8192), stack=16),
    "gpt-oss-20b": Layer(64, 8, 64, 64, MaskSpec(window=128), has_sinks=True),
    "StarCoder": Layer(48, 1, 128, 128, stack=16),
    "Falcon-40B": Layer(128, 8, 64, 64),
    "tiny": Layer(4, 2, 8, 8),
    "tiny, float8 cache": Layer(4, 2, 8, 8, is_float8=True),
}


def variant_on(target: int, layer: Layer, is_decode: bool) -> Variant:
    cache_dtype = torch.uint8 if layer.is_float8 else torch.bfloat16
    return variant_for(
        Target(target, SHARED_LIMIT[target], NUM_SMS),
        is_decode,
        1 if is_decode else block_q_for(layer.num_heads // layer.num_kv_heads),
        torch.bfloat16,
        (layer.num_heads, layer.head_dim),
        cache_dtype,
        (BLOCK_SIZE, layer.num_kv_heads, layer.head_dim),
        strides(layer, layer.head_dim),
        layer.value_dim,
        strides(layer, layer.value_dim // 2 if layer.is_float8 else layer.value_dim),
        2048,
        layer.mask,
        layer.head_dim**-0.5,
        layer.softcap,
    )


def strides(layer: Layer, dim: int) -> tuple[int, int, int, int]:
    return BLOCK_SIZE * layer.num_kv_heads * dim, layer.num_kv_heads * dim, dim, 1


def launch_of(layer: Layer, variant: Variant) -> dict[str, Any]:
    """Return what `compiling` takes to compile a variant."""
    arguments = {
        "output": "*bf16",
        "query": "*bf16",
        "key_cache": "*u8" if layer.is_float8 else "*bf16",
        "value_cache": "*i16" if layer.is_float8 else "*bf16",
        "block_tables": "*i32",
        "items": "*i32",
        "num_items": "*i32",
        "counters": "*i32",
        "partial_acc": "*fp32",
        "partial_stats": "*fp32",
        "query_row_stride": "i32",
        "query_head_stride": "i32",
    }
    optional = {
        "sinks": "*bf16" if layer.has_sinks else None,
        "k_scale": "*fp32" if layer.is_float8 else None,
        "v_scale": "*fp32" if layer.is_float8 else None,
    }
    arguments |= {name: kind for name, kind in optional.items() if kind is not None}
    absent: dict[str, Any] = {name: None for name, kind in optional.items() if kind is None}
    return {
        "kernel": "kernels.paged_attention.kernel.attend_kernel",
        "arguments": arguments,
        "constants": {"S": variant.spec, **absent},
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "divisible": frozenset({"query_row_stride", "query_head_stride"}),
    }


def compile_variants(layer: Layer, variants: dict[int, Variant]) -> dict[int, Resources]:
    futures = {
        target: compiling.workers().submit(
            compiling._compile, target, *launch_of(layer, variant).values()
        )
        for target, variant in variants.items()
    }
    return {target: future.result() for target, future in futures.items()}


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("is_decode", [True, False], ids=["decode", "prefill"])
def test_registers_and_shared_memory_suffice(layer: Layer, is_decode: bool) -> None:
    variants = {target: variant_on(target, layer, is_decode) for target in TARGETS}
    for target, resources in compile_variants(layer, variants).items():
        assert resources.stack <= layer.stack, (target, resources)
        assert resources.shared <= SHARED_LIMIT[target], (target, resources)
        if is_decode:
            variant = variants[target]
            programs = variant.max_programs // NUM_SMS
            assert programs * (resources.shared + 1024) <= SHARED_LIMIT[target] + 1024
            assert programs * variant.num_warps * 32 * resources.registers <= REGISTERS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3.1-8B, float8 cache", "Gemma-2-9B"])
@pytest.mark.parametrize("is_decode", [True, False], ids=["decode", "prefill"])
def test_the_plan_is_read_before_the_wait_and_all_else_after(name: str, is_decode: bool) -> None:
    layer = LAYERS[name]
    code = compiling.disassemble(**launch_of(layer, variant_on(90, layer, is_decode)))
    (wait,) = positions(code, "ACQBULK")
    before = [at for at in positions(code, "LDG|STG|ATOM|RED") if at < wait]
    # The number of items, and the six fields of the first.
    assert len(before) == 7
    assert before == positions(code, r"LDG\.E R")[:7]
    # The block ids of a run's first keys are on their way.
    prefetches = positions(code, r"CCTL\.E\.PF2")
    assert len([at for at in prefetches if at < wait]) == len(prefetches) == int(is_decode)
    # No field waits for another, which would need a branch.
    assert not [at for at in positions(code, "BRA") if before[1] < at < before[-1]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3.1-8B, float8 cache", "Gemma-2-9B"])
@pytest.mark.parametrize("is_decode", [True, False], ids=["decode", "prefill"])
def test_keys_and_values_are_copied_sixteen_bytes_at_a_time(name: str, is_decode: bool) -> None:
    layer = LAYERS[name]
    code = compiling.disassemble(**launch_of(layer, variant_on(90, layer, is_decode)))
    copies = positions(code, "LDGSTS")
    tables = positions(code, r"LDGSTS\.E (?!\.)")  # of block ids, one each
    assert len(copies) - len(tables) == len(positions(code, r"LDGSTS.*\.128"))


@pytest.mark.slow
def test_twelve_partials_are_loaded_before_the_first_is_folded() -> None:
    layer = LAYERS["Llama-3.1-8B"]
    code = compiling.disassemble(**launch_of(layer, variant_on(90, layer, is_decode=True)))
    arrival = max(positions(code, "ATOM"))
    loads = [at for at in positions(code, r"LDG\.E\.128\.STRONG") if at > arrival]
    folds = [at for at in positions(code, "MUFU.EX2") if at > loads[0]]
    assert len([at for at in loads if at < folds[0]]) >= 12


def test_a_float8_cache_is_read_further_ahead_where_there_is_room() -> None:
    layers = LAYERS["Llama-3.1-8B"], LAYERS["Llama-3.1-8B, float8 cache"]
    for target, stages in ((80, (5, 7)), (90, (5, 7)), (100, (5, 7)), (120, (5, 5))):
        found = [variant_on(target, layer, is_decode=True).num_stages for layer in layers]
        assert tuple(found) == stages
