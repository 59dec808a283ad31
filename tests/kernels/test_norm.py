"""Norms round where the model families of transformers round."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.helium.modeling_helium import HeliumRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm, Llama4TextRMSNorm
from transformers.models.nanochat.modeling_nanochat import NanoChatRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from kernels.norm import NormForm, add_norm_torch, add_norm_triton, norm_torch, norm_triton
from kernels.ops import AddNorm, Norm
from tests.kernels.rounding import DEVICE, ulps

EPS = 1e-5
LLAMA = NormForm(EPS)
ROUNDS_LAST = NormForm(EPS, rounds_first=False)
GEMMA = NormForm(EPS, offset=1.0, rounds_first=False)
CENTRED = NormForm(EPS, centred=True, rounds_first=False)
FAMILIES: dict[str, tuple[Callable[[int], nn.Module], NormForm]] = {
    "llama": (lambda n: LlamaRMSNorm(n, EPS), LLAMA),
    "qwen3": (lambda n: Qwen3RMSNorm(n, EPS), LLAMA),
    "llama4": (lambda n: Llama4TextRMSNorm(n, EPS), LLAMA),
    "t5": (lambda n: T5LayerNorm(n, EPS), LLAMA),
    "gemma2": (lambda n: Gemma2RMSNorm(n, EPS), GEMMA),
    "gemma3": (lambda n: Gemma3RMSNorm(n, EPS), GEMMA),
    "gemma4": (lambda n: Gemma4RMSNorm(n, EPS), ROUNDS_LAST),
    "gemma4, weightless": (lambda n: Gemma4RMSNorm(n, EPS, with_scale=False), ROUNDS_LAST),
    "olmo2": (lambda n: Olmo2RMSNorm(n, EPS), ROUNDS_LAST),
    "gpt_oss": (lambda n: GptOssRMSNorm(n, EPS), ROUNDS_LAST),
    "helium": (lambda n: HeliumRMSNorm(n, EPS), ROUNDS_LAST),
    "llama4, weightless": (lambda _: Llama4TextL2Norm(EPS), LLAMA),
    "nanochat": (lambda _: NanoChatRMSNorm(EPS), LLAMA),
    "cohere": (lambda n: CohereLayerNorm(n, EPS), CENTRED),
    "olmo": (lambda n: OlmoLayerNorm(n), CENTRED),
    "LayerNorm": (lambda n: nn.LayerNorm(n, EPS), CENTRED),
    "LayerNorm, no bias": (lambda n: nn.LayerNorm(n, EPS, bias=False), CENTRED),
}
NORMS = [norm_torch, norm_triton]
ADD_NORMS = [add_norm_torch, add_norm_triton]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with DEVICE:
        torch.manual_seed(0)
        yield


def a_module(family: str, hidden: int, dtype: torch.dtype) -> tuple[nn.Module, NormForm]:
    """Return a norm of the family with random weights."""
    make, form = FAMILIES[family]
    module = make(hidden).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(hidden) * 0.3)
    return module.requires_grad_(False), form


def weights(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return getattr(module, "weight", None), getattr(module, "bias", None)


def check_last_bit(normed: Tensor, expected: Tensor) -> None:
    """Check that no element is off by more than 1 ulp, and that nearly all are equal.

    Near a zero of LayerNorm the ulp is none of its own but that of its terms, near 1.
    """
    eps32 = torch.finfo(torch.float32).eps
    distance = ulps(normed, expected)
    close = (normed.float() - expected.float()).abs() < 4 * eps32
    if normed.dtype == torch.float32:
        assert (close | (distance <= 4)).all()
    else:
        assert (close | (distance <= 1)).all()
        assert (distance == 0).float().mean() > 0.995


def exact_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm) -> Tensor:
    x = x.double()
    if form.centred:
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + form.eps).sqrt()
    if weight is not None:
        x = x * (weight.double() + form.offset)
    return x if bias is None else x + bias.double()


@pytest.mark.parametrize("implementation", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_each_family_is_normed_as_its_module_does(
    implementation: Norm, dtype: torch.dtype, family: str
) -> None:
    module, form = a_module(family, 900, dtype)
    x = (torch.randn(1, 7, 900) * 3 + 0.5).to(dtype)
    normed = implementation(x, *weights(module), form)
    assert normed.shape == x.shape
    assert normed.dtype == dtype
    check_last_bit(normed, module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [f for f in FAMILIES if FAMILIES[f][1] is not CENTRED])
def test_in_torch_nothing_differs_from_the_module(dtype: torch.dtype, family: str) -> None:
    module, form = a_module(family, 900, dtype)
    x = torch.randn(5, 900).to(dtype)
    assert torch.equal(norm_torch(x, *weights(module), form), module(x))


@pytest.mark.parametrize("implementation", NORMS)
def test_the_place_of_the_rounding_shows(implementation: Norm) -> None:
    """A wrong form differs in far more than a few last bits."""
    module, form = a_module("llama", 512, torch.bfloat16)
    x = torch.randn(9, 512).bfloat16()
    weight, bias = weights(module)
    other = NormForm(form.eps, rounds_first=False)
    differing = implementation(x, weight, bias, other) != module(x)
    assert differing.float().mean() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("implementation", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 7, 64, 80, 128, 1000, 1024, 2304, 5000])
@pytest.mark.parametrize("form", [LLAMA, GEMMA, CENTRED], ids=["llama", "gemma", "centred"])
def test_hidden_size_may_be_any_number(
    implementation: Norm, dtype: torch.dtype, hidden: int, form: NormForm
) -> None:
    x = torch.randn(19, hidden).to(dtype)
    weight, bias = torch.randn(2, hidden).to(dtype)
    normed = implementation(x, weight, bias if form.centred else None, form)
    expected = exact_norm(x, weight, bias if form.centred else None, form)
    error = (normed.double() - expected).abs()
    assert (error <= 4 * torch.finfo(dtype).eps * (1 + expected.abs())).all()


@pytest.mark.parametrize("implementation", NORMS)
def test_a_constant_row_is_nothing_once_centred(implementation: Norm) -> None:
    x = torch.full((2, 96), 2.5)
    assert implementation(x, None, None, CENTRED).abs().max() < 1e-3
    assert torch.equal(implementation(torch.zeros(2, 96), None, None, LLAMA), torch.zeros(2, 96))


@pytest.mark.parametrize("implementation", NORMS)
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_heads_of_a_fused_projection_are_normed_in_place(
    implementation: Norm, num_tokens: int, num_heads: int
) -> None:
    """A q_norm normalises each head and reads it where the projection left it."""
    module, form = a_module("qwen3", 48, torch.bfloat16)
    fused = torch.randn(1, num_tokens, 2 * num_heads * 48 + 16).bfloat16()
    heads = fused[..., 16 : 16 + num_heads * 48].unflatten(-1, (num_heads, 48))
    normed = implementation(heads, *weights(module), form)
    assert normed.is_contiguous()
    check_last_bit(normed, module(heads.contiguous()))


@pytest.mark.parametrize("implementation", NORMS)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(12, 8, 64).transpose(0, 1),  # heads before tokens
        lambda x: x.view(4, 24, 64)[:, 2:19],  # some of a head's tokens
        lambda x: x.view(96, 64)[1::3],  # one stride, not the row's size
        lambda x: x.view(1, 1, 96, 64)[:, :, :1],  # one row
        lambda x: x.view(48, 2, 64)[:, :1].expand(-1, 5, -1),  # one row for many
        lambda x: x.view(96, 64)[:0],  # none
    ],
)
def test_rows_may_have_any_strides(implementation: Norm, view: Callable[[Tensor], Tensor]) -> None:
    x = view(torch.randn(96 * 64))
    weight = torch.randn(64)
    strided = implementation(x, weight, None, LLAMA)
    assert strided.shape == x.shape
    assert torch.equal(strided, implementation(x.clone().contiguous(), weight, None, LLAMA))


@pytest.mark.parametrize("implementation", ADD_NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "LayerNorm"])
def test_the_norm_is_of_the_rounded_sum(
    implementation: AddNorm, dtype: torch.dtype, family: str
) -> None:
    module, form = a_module(family, 900, dtype)
    x, residual = torch.randn(2, 1, 7, 900).to(dtype)
    before = x.clone(), residual.clone()
    normed, total = implementation(x, residual, *weights(module), form)
    assert torch.equal(total, residual + x)
    check_last_bit(normed, module(residual + x))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("implementation", ADD_NORMS)
def test_summands_may_differ_in_strides(implementation: AddNorm) -> None:
    x = torch.randn(1, 6, 2 * 200)[..., 200:]
    residual = torch.randn(1, 12, 200)[:, ::2]
    weight = torch.randn(200)
    strided = implementation(x, residual, weight, None, GEMMA)
    contiguous = implementation(x.contiguous(), residual.contiguous(), weight, None, GEMMA)
    assert all(torch.equal(a, b) for a, b in zip(strided, contiguous, strict=True))
    assert all(result.is_contiguous() for result in strided)


@pytest.mark.parametrize("hidden", [64, 1500])
def test_a_row_does_not_depend_on_the_others(hidden: int) -> None:
    x = torch.randn(33, hidden).bfloat16()
    weight = torch.randn(hidden).bfloat16()
    together = norm_triton(x, weight, None, LLAMA)
    for row in (0, 16, 32):
        alone = norm_triton(x[row : row + 1], weight, None, LLAMA)
        assert torch.equal(together[row : row + 1], alone)
