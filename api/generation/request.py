"""What a client may ask for: TGI's request body, to which every other dialect is translated.

The models are strict as serde is: unknown keys are ignored, null is taken only where the type
says so.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from api.http.serde import F32, I32, U32, U64, USIZE


class WireRequest(BaseModel):
    """Strict, and blind to what it does not know."""

    model_config = ConfigDict(strict=True, frozen=True)


class GrammarType(WireRequest):
    type: Literal["json", "json_object", "regex", "json_schema"]
    value: JsonValue


class GenerateParameters(WireRequest):
    """How to generate. Present but empty, it means greedy; absent, it means sampling."""

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


class GenerateRequest(WireRequest):
    inputs: str
    parameters: GenerateParameters = Field(
        default_factory=lambda: GenerateParameters(do_sample=True)
    )


class CompatGenerateRequest(GenerateRequest):
    stream: bool = False
