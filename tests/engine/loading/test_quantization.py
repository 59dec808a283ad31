"""Models quantised while loading answer as `generate` does with the same weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from engine.core.config import DEFAULT_MODEL_ID, LoadConfig, Quantization
from engine.core.errors import LoadError
from engine.linear.int8 import Int8Linear
from engine.loading.checkpoint import locate
from engine.loading.loader import LoadedModel, load
from tests.engine import models
from tests.engine.driving import check_greedy, generate, greedy, make_engine, run
from tests.engine.models import byte_tokenizer

pytestmark = pytest.mark.slow

PROMPTS = [list(range(7 * i, 7 * i + n)) for i, n in enumerate((5, 29, 1, 40, 16, 33))]
PROMPTS += [PROMPTS[3][:34] + PROMPTS[0]]
NUM_TOKENS = 10


@pytest.fixture(scope="module", autouse=True)
def _plain_processor() -> Iterator[None]:
    """Use one thread, and bitsandbytes without AVX512-BF16: it computes in the type asked for."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=get_args(Quantization))
def method(request: pytest.FixtureRequest) -> Quantization:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that is not quantised."""
    return save(models.reference("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(folder: Path, method: Quantization) -> LoadedModel:
    return load(LoadConfig(str(folder), quantize=method))


@pytest.fixture(scope="module")
def quantized(folder: Path, method: Quantization, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, quantised already."""
    return save(by_transformers(folder, method), tmp_path_factory.mktemp("quantized"))


@pytest.fixture(scope="module")
def expected(folder: Path, method: Quantization) -> PreTrainedModel:
    return reference(folder, method)


def save(model: PreTrainedModel, path: Path) -> Path:
    model.save_pretrained(path)
    byte_tokenizer()._hf.save_pretrained(path)
    return path


def by_transformers(
    path: Path, method: Quantization, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model as a user of transformers gets it."""
    if method == "bitsandbytes":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=method.removeprefix("bitsandbytes-"),
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=dtype, device_map="cpu"
    )


def reference(
    path: Path, method: Quantization, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The same; with int8 weights, it does not quantise the linears' inputs as well."""
    model = by_transformers(path, method, dtype)
    return model.dequantize(torch.float32) if method == "bitsandbytes" else model


def kinds_of_linears(model: nn.Module) -> set[str]:
    return {type(m).__name__ for m in model.modules() if hasattr(m, "in_features")}


def check_in_company(
    loaded: LoadedModel, expected: PreTrainedModel, prompts: list[list[int]]
) -> None:
    engine = make_engine(loaded, max_batch_tokens=11, max_sequences=4)
    requests = [greedy(prompt, NUM_TOKENS) for prompt in prompts]
    answers = run(engine, [(3 * i, request) for i, request in enumerate(requests)])
    answers.check_endings(requests)
    for request in requests:
        check_greedy(expected, answers, request)


def test_a_quantised_model_answers_as_generate(
    loaded: LoadedModel, expected: PreTrainedModel
) -> None:
    engine = make_engine(loaded)
    for prompt in PROMPTS[:3]:
        request = greedy(prompt, NUM_TOKENS)
        answers = run(engine, [(0, request)])
        check_greedy(expected, answers, request)
        assert answers.ids(request) == generate(expected, prompt, NUM_TOKENS)


def test_neighbours_and_chunks_change_no_answer(
    loaded: LoadedModel, expected: PreTrainedModel
) -> None:
    check_in_company(loaded, expected, PROMPTS)


def test_linears_are_quantised_and_the_head_is_not(
    loaded: LoadedModel, method: Quantization
) -> None:
    quantised = "Int8Linear" if method == "bitsandbytes" else "Linear4bit"
    assert kinds_of_linears(loaded.model.model) == {quantised}
    assert kinds_of_linears(loaded.model.lm_head) <= {"Linear", "PackedLinear"}


def test_a_checkpoint_quantised_already_is_served_as_it_is(
    quantized: Path, method: Quantization, expected: PreTrainedModel
) -> None:
    for quantize in (None, method):
        served = load(LoadConfig(str(quantized), quantize=quantize))
        request = greedy(PROMPTS[1], NUM_TOKENS)
        check_greedy(expected, run(make_engine(served), [(0, request)]), request)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linears_compute_in_the_type_that_is_served(
    folder: Path, method: Quantization, dtype: torch.dtype
) -> None:
    name = "model.layers.0.mlp.down_proj"
    type_name = str(dtype).removeprefix("torch.")
    model = load(LoadConfig(str(folder), quantize=method, dtype=type_name)).model
    x = torch.randn(3, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    linear = model.get_submodule(name)
    y = linear(x)
    exact = reference(folder, method, dtype).get_submodule(name)(x.float())
    assert y.dtype == model.dtype == dtype
    assert getattr(linear, "compute_dtype", dtype) == dtype
    assert (y - exact).square().mean().sqrt() / exact.std() < torch.finfo(dtype).eps


def test_transposed_weights_are_quantised(method: Quantization, tmp_path: Path) -> None:
    """GPT-2 keeps its matrices transposed, and its linears have a bias."""
    save(models.reference("gpt2"), tmp_path)
    served = load(LoadConfig(str(tmp_path), quantize=method))
    request = greedy(PROMPTS[1], NUM_TOKENS)
    check_greedy(reference(tmp_path, method), run(make_engine(served), [(0, request)]), request)


def test_a_processor_with_avx512_bf16_gives_the_same_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There bitsandbytes would compute 4 bits in bfloat16, and refuse odd sizes."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    served = load(LoadConfig(str(folder), quantize="bitsandbytes-nf4"))
    request = greedy(PROMPTS[0], NUM_TOKENS)
    answers = run(make_engine(served), [(0, request)])
    monkeypatch.undo()
    check_greedy(reference(folder, "bitsandbytes-nf4"), answers, request)


class TestInt8Linear:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(0, 17), (1, 17), (2, 5, 17)])
    def test_int8_linear_computes_a_linear_of_scaled_weights(
        self, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        torch.manual_seed(0)
        weight = torch.randint(-127, 128, (9, 17), dtype=torch.int8)
        absmax, bias = torch.rand(9), torch.randn(9).to(dtype)
        x = torch.randn(shape).to(dtype)
        y = Int8Linear(weight, absmax, torch.nn.Parameter(bias))(x)
        exact = x.double() @ (weight.double() * absmax.double()[:, None] / 127).T + bias.double()
        assert y.dtype == dtype
        torch.testing.assert_close(
            y.double(), exact, rtol=0, atol=float(8 * torch.finfo(dtype).eps * 4)
        )

    def test_an_outlier_changes_no_other_row(self, folder: Path) -> None:
        """In bitsandbytes' own linear it does, which is the reason for ours."""
        x = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
        x[1, 3] = 50.0
        own = by_transformers(folder, "bitsandbytes").model.layers[0].mlp.up_proj
        ours = Int8Linear(own.weight.data.clone(), own.weight.SCB.clone(), None)

        def change(linear: torch.nn.Module) -> float:
            return float((linear(x)[:1] - linear(x[:1])).abs().max())

        assert change(ours) < 1e-5 < 1e-4 < change(own)


@pytest.mark.parametrize(
    ("own", "quantize", "reason"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bitsandbytes",
            "already, with bitsandbytes-nf4,.*leave out QUANTIZE",
        ),
        ({"quant_method": "gptq"}, "bitsandbytes-nf4", "already, with gptq,.*leave out QUANTIZE"),
        ({"quant_method": "exl2"}, None, "with exl2, which transformers does not know"),
    ],
)
def test_a_checkpoint_quantised_otherwise_is_refused(
    tmp_path: Path, own: dict[str, object], quantize: Quantization | None, reason: str
) -> None:
    save(models.reference("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": own}))
    with pytest.raises(LoadError, match=reason):
        load(LoadConfig(str(tmp_path), quantize=quantize))


def test_quantised_smollm2_answers_the_same_in_a_batch(method: Quantization) -> None:
    served = load(LoadConfig(DEFAULT_MODEL_ID, quantize=method))
    texts = [
        "The capital of France is",
        "Once upon a time, in a village by the sea, there lived",
        "日本の首都は",
        "List three colours of the rainbow, one per line, and then explain in detail why " * 3,
    ]
    expected = reference(locate(DEFAULT_MODEL_ID).path, method)
    check_in_company(served, expected, [served.tokenizer.encode(text) for text in texts])
