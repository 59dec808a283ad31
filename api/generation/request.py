"""TGI's request body, to which the requests of all other routes are translated.

The models are strict as serde is: unknown keys are ignored, and null is accepted only if the
type allows it.
"""

from functools import cache
from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, JsonValue, model_validator

from api.http.serde import F32, I32, U32, U64, USIZE, Vec, check_repeated


class WireRequest(BaseModel):
    """The base of all request bodies: strict in its types, and ignores unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_each_field_once(cls, value: object) -> object:
        check_repeated(value, _wire_names(cls))
        return value


@cache
def _wire_names(model: type[BaseModel]) -> frozenset[str]:
    """Return the names of the fields of `model` in JSON."""
    names: set[str] = set()
    for name, field in model.model_fields.items():
        alias = field.validation_alias or name
        names.update(map(str, alias.choices) if isinstance(alias, AliasChoices) else [str(alias)])
    return frozenset(names)


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
    stop: Vec[str] = []
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
