"""TGI's request body, to which the requests of all other routes are translated.

The models are strict as serde is: unknown keys are ignored, and null is accepted only if the
type allows it.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from api.http.serde import F32, I32, U32, U64, USIZE


class WireRequest(BaseModel):
    """The base of all request bodies: strict in its types, and ignores unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True)


class GrammarType(WireRequest):
    type: Literal["json", "json_object", "regex", "json_schema"]
    value: JsonValue


class GenerateParameters(WireRequest):
    """How to generate.

    An empty object means greedy decoding; if there is none at all, the request samples.
    """

    best_of: USIZE | None = None
    temperature: F32 | None = None
    repetition_penalty: F32 | None = None
    frequency_penalty: F32 | None = None
    top_k: I32 | None = None
    top_p: F32 | None = None
    typical_p: F32 | None = None
    do_sample: bool = False
    max_new_tokens: U32 | None = None
    return_full_text: bool | None = None
    stop: list[str] = []
    truncate: USIZE | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: U64 | None = None
    top_n_tokens: U32 | None = None
    grammar: GrammarType | None = None
    adapter_id: str | None = None
    """Only its type is checked: TGI without adapters ignores it, too."""


class GenerateRequest(WireRequest):
    inputs: str
    parameters: GenerateParameters = Field(
        default_factory=lambda: GenerateParameters(do_sample=True)
    )


class CompatGenerateRequest(GenerateRequest):
    stream: bool = False
