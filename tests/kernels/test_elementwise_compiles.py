"""The kernels between the GEMMs compile for every GPU at real shapes, and nothing spills."""

from dataclasses import dataclass
from typing import Any

import pytest

from tests.kernels.compiling import (
    SHARED_LIMIT,
    TARGETS,
    compile_everywhere,
    disassemble,
    positions,
)

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Kernel:
    """A kernel with the types of its arguments, its constants and its options."""

    name: str
    arguments: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    divisible: frozenset[str] = frozenset()

    def instructions(self, target: int = 90) -> list[str]:
        return disassemble(
            f"kernels.{self.name}",
            self.arguments,
            self.constants,
            num_warps=self.num_warps,
            divisible=self.divisible,
            target=target,
        )


def check(kernel: Kernel) -> None:
    compiled = compile_everywhere(
        f"kernels.{kernel.name}",
        kernel.arguments,
        kernel.constants,
        num_warps=kernel.num_warps,
        divisible=kernel.divisible,
    )
    for target, resources in compiled.items():
        assert resources.stack == 0, target
        assert resources.shared <= SHARED_LIMIT[target], target


HIDDEN_SIZES = {"llama-3.1-8b": 4096, "gemma-2-9b": 3584, "large": 16384}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("model", HIDDEN_SIZES)
def test_norm_of_hidden_states_compiles(model: str, added: bool, dtype: str) -> None:
    hidden = HIDDEN_SIZES[model]
    block = 1 << (hidden - 1).bit_length()
    check(norm(dtype, added, hidden, block, rows=1, num_warps=min(32, block // 512)))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_norm_of_heads_compiles(head_dim: int) -> None:
    check(norm("bf16", False, head_dim, head_dim, rows=1024 // head_dim, num_warps=4))


def norm(dtype: str, added: bool, hidden: int, block: int, rows: int, num_warps: int) -> Kernel:
    tensors = ["x_ptr", "normed_ptr", "weight_ptr", "bias_ptr"]
    tensors += ["residual_ptr", "total_ptr"] if added else []
    strides = ["x_token_stride", "x_head_stride", "residual_token_stride", "residual_head_stride"]
    return Kernel(
        "norm._norm_kernel",
        dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys([*strides, "num_rows", "heads"], "i32"),
        {
            **({} if added else {"residual_ptr": None, "total_ptr": None}),
            "HIDDEN": hidden,
            "BLOCK": block,
            "ROWS": rows,
            "EPS": 1e-6,
            "CENTRED": True,
            "OFFSET": 1.0,
            "ROUNDS_FIRST": True,
        },
        num_warps=num_warps,
        divisible=frozenset(strides),
    )


@pytest.mark.parametrize("added", [False, True])
def test_norm_loads_its_weight_before_it_waits_for_its_input(added: bool) -> None:
    code = norm("bf16", added, 4096, 4096, rows=1, num_warps=8).instructions()
    (wait,) = positions(code, "ACQBULK")
    loads = positions(code, "LDG")
    assert loads == positions(code, r"LDG\.E\.128")
    # A thread has 16 elements of each, which are two loads.
    assert [at < wait for at in loads] == [True] * 2 + [False] * (6 if added else 4)
    assert max(loads) < min(positions(code, "BAR.SYNC"))


@pytest.mark.parametrize(
    ("activation", "n"), [("silu", 14336), ("gelu_tanh", 14336), ("gelu", 14336), ("relu2", 6912)]
)
def test_act_mul_compiles(activation: str, n: int) -> None:
    check(act_mul(activation, n))


def act_mul(activation: str, n: int) -> Kernel:
    return Kernel(
        "activation._act_mul_kernel",
        dict.fromkeys(["gate_ptr", "up_ptr", "output_ptr"], "*bf16")
        | {"gate_stride": "i32", "up_stride": "i32"},
        {"N": n, "ACTIVATION": activation, "BLOCK": 1024},
        divisible=frozenset({"gate_stride", "up_stride"}),
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu2"])
def test_act_mul_loads_both_inputs_before_it_computes(activation: str, target: int) -> None:
    code = act_mul(activation, 14336).instructions(target)
    loads = positions(code, "LDG")
    assert loads == positions(code, r"LDG\.E\.128")
    assert len(loads) == 2
    assert loads[0] >= max(positions(code, "ACQBULK"), default=0)
    assert loads[1] - loads[0] <= 4  # the barrier, and perhaps an address
    assert loads[1] < min(positions(code, "MUFU") + positions(code, "FMUL"))


MODELS = {"llama-3.1-8b": (32, 8, 128), "gemma-2-9b": (16, 8, 256)}


@pytest.mark.parametrize("cache", ["bf16", "u8"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_rotary_store_kv_compiles(model: str, interleaved: bool, cache: str) -> None:
    num_heads, num_kv_heads, head_dim = MODELS[model]
    check(store(num_heads, num_kv_heads, head_dim, head_dim // 2, interleaved, cache))


@pytest.mark.parametrize("cache", ["bf16", "u8"])
def test_store_kv_alone_compiles(cache: str) -> None:
    check(store(0, 8, 128, 0, False, cache))


def test_rotary_of_the_query_alone_compiles() -> None:
    check(store(32, 0, 128, 64, False, "bf16"))


@pytest.mark.parametrize("cache", ["bf16", "u8"])
@pytest.mark.parametrize("pairs", [0, 64])
def test_keys_and_values_are_loaded_before_their_slot_is_known(pairs: int, cache: str) -> None:
    code = store(32 if pairs else 0, 8, 128, pairs, False, cache).instructions()
    (wait,) = positions(code, "ACQBULK")
    slots = positions(code, r"LDG\.E\.64 R")
    assert wait < min(positions(code, "LDG|STG"))
    assert slots
    for slot in slots:
        # All of its path is loaded before the slot is looked at.
        register = code[slot].split()[1].rstrip(",")
        used = next(at for at in positions(code, rf"\b{register}\b") if at > slot)
        end = next(at for at in positions(code, r"^(@!?P\d )?(BRA|EXIT|STG)") if at > slot)
        assert used > max(at for at in positions(code, "LDG") if at < end)
    vectors = len(positions(code, r"LDG\.E\.128"))
    others = len(slots) * (2 if cache == "u8" else 1)  # each with the heads' scales
    assert len(positions(code, "LDG")) == vectors + others


def store(
    num_heads: int, num_kv_heads: int, head_dim: int, pairs: int, interleaved: bool, cache: str
) -> Kernel:
    heads_per_program = 1024 // head_dim
    pointers = {"key_cache_ptr": f"*{cache}", "value_cache_ptr": f"*{cache}", "slot_ptr": "*i64"}
    present = {
        "*bf16": ["query_ptr", "rotated_ptr"] * bool(num_heads)
        + ["key_ptr", "value_ptr"] * bool(num_kv_heads)
        + ["cos_ptr", "sin_ptr"] * bool(pairs),
        "*fp32": ["k_scale_ptr", "v_scale_ptr"] * (cache == "u8"),
    }
    for kind, names in present.items():
        pointers |= dict.fromkeys(names, kind)
    optional = {"query_ptr", "rotated_ptr", "key_ptr", "value_ptr", "cos_ptr", "sin_ptr"}
    absent = (optional | {"k_scale_ptr", "v_scale_ptr"}) - pointers.keys()
    strides = [f"{x}_{y}_stride" for x in ("query", "key", "value") for y in ("token", "head")]
    strides += ["table_token_stride"]
    return Kernel(
        "store_kv._rotary_store_kv_kernel",
        pointers | dict.fromkeys(strides, "i32"),
        {
            **dict.fromkeys(absent),
            "table_pair_stride": 1,
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "HEAD_DIM": head_dim,
            "VALUE_DIM": head_dim,
            "PAIRS": pairs,
            "INTERLEAVED": interleaved,
            "IN_FLOAT32": False,
            "HEADS": heads_per_program,
            "QUERY_PROGRAMS": -(-num_heads // heads_per_program),
            "KV_PROGRAMS": -(-num_kv_heads // heads_per_program),
        },
        num_warps=2,
        divisible=frozenset(strides),
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_mask_tokens_compiles(dtype: str) -> None:
    kernel = Kernel(
        "token_mask._mask_tokens_kernel",
        {"logits_ptr": f"*{dtype}", "rows_ptr": "*i64", "masks_ptr": "*i32"}
        | dict.fromkeys(["row_stride", "mask_stride", "vocab_size"], "i32"),
        {"BLOCK": 1024},
        divisible=frozenset({"row_stride"}),
    )
    check(kernel)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_watermark_compiles(dtype: str) -> None:
    kernel = Kernel(
        "watermark._watermark_kernel",
        {"logits_ptr": f"*{dtype}", "rows_ptr": "*i64", "previous_ptr": "*i64", "delta": "fp32"}
        | dict.fromkeys(["row_stride", "threshold", "vocab_size"], "i32"),
        {"SEED": 15485863, "BLOCK": 1024},
        divisible=frozenset({"row_stride"}),
    )
    check(kernel)
