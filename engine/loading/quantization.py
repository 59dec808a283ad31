"""Quantises weights with bitsandbytes, under the names of Text Generation Inference.

transformers replaces the model's linears as they load. `lm_head`, the embeddings and all that
is not a linear (such as the stacked experts of a mixture) stay as they are. A checkpoint that
is quantised already is served as it is, its type included.

Only weights are quantised: the linears compute in the type that is served, whatever the
processor and the rest of the batch. For that reason two methods of bitsandbytes are not used:

- LLM.int8 quantises the linears' inputs too. Where any row of the batch has an outlier, its
  column leaves the int8 product for all rows, so a request changes its neighbours; on CUDA
  the host waits for the device in every linear besides. Without outliers (threshold 0) rows
  are independent, but not what made them: the last bits of a float32, which differ with the
  number of rows, push a value over to its next int8, and beside an outlier the steps are
  wide. `Int8Linear` converts its weights to the input's type for each call instead.
- 4 bits on a CPU with AVX512-BF16 are computed in bfloat16, whatever type was asked for.

SmolLM2-135M-Instruct in float32 over 512 tokens: the mean loss, and where the same tokens
are computed in chunks of 32, the largest change of a log-probability and the number of
first choices that change:

                              loss   change   choices
    not quantised             4.42     8e-5         0
    LLM.int8                  4.44        4        49
    LLM.int8, threshold 0     4.43        3        27
    int8 weights only         4.42     6e-5         0
    nf4                       4.69     6e-5         0
    fp4                       4.88     5e-5         0
"""

from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from engine.core.config import Quantization
from engine.core.errors import LoadError
from engine.linear.int8 import Int8Linear
from engine.linear.replace import replace_linears

_ARGUMENTS: dict[Quantization, dict[str, Any]] = {
    "bitsandbytes": {"load_in_8bit": True},
    "bitsandbytes-nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes-fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}


def loading_options(
    model_id: str, config: PreTrainedConfig, quantize: Quantization | None
) -> dict[str, Any]:
    """Return the options of `from_pretrained` that quantise the weights as `quantize` says.

    Raises LoadError if the checkpoint is quantised in another way, or in an unknown one.
    """
    own, name = _own_quantization(config), quantization_of(config)
    if own is None:
        if quantize is None:
            return {}
        return {"quantization_config": BitsAndBytesConfig(**_ARGUMENTS[quantize])}
    if not AutoHfQuantizer.supports_quant_method(own):
        raise LoadError(f"{model_id} is quantised with {name}, which transformers does not know")
    if quantize not in (None, name):
        raise LoadError(
            f"{model_id} is quantised already, with {name}, and cannot be quantised again with "
            f"{quantize}: leave out QUANTIZE, or name a checkpoint that is not quantised"
        )
    return {}


def _own_quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return the quantisation that config.json declares for the checkpoint's weights."""
    for part in (config, config.get_text_config(decoder=True)):
        own = getattr(part, "quantization_config", None)
        if own is not None:
            return own if isinstance(own, dict) else own.to_dict()
    return None


def quantization_of(config: PreTrainedConfig) -> str | None:
    """Return the method under the name that `quantize` has for it, or else its own; or None."""
    own = _own_quantization(config)
    if own is None:
        return None
    if own.get("load_in_8bit"):
        return "bitsandbytes"
    if own.get("load_in_4bit"):
        return f"bitsandbytes-{own.get('bnb_4bit_quant_type', 'fp4')}"
    return str(own.get("quant_method", "an unnamed method"))


def compute_in_served_type(model: PreTrainedModel) -> None:
    """Have the linears that bitsandbytes quantised, if any, compute in the model's type.

    8-bit linears are replaced, 4-bit ones are configured; both in place.
    """
    if getattr(model, "quantization_method", None) != "bitsandbytes":
        return
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt  # slow, and seldom needed

    def int8(linear: nn.Module) -> Int8Linear | None:
        if not isinstance(linear, Linear8bitLt):
            return None
        weight: Any = linear.weight
        return Int8Linear(weight.data, weight.SCB, linear.bias)

    replace_linears(model, int8)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = model.dtype, True
            module.support_avx512bf16_for_cpu = False
