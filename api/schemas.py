"""TGI's request and response models: names, types and key order of its wire.

Requests are pydantic models, strict as serde is: unknown keys are ignored, null is
taken only where the type says so. Responses are typed dicts in the order of their
keys: one is built for each token, where a model costs eight times as much (4.9 µs, 0.6).
"""

from typing import Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from typing_extensions import TypedDict

from api.serde import F32, I32, U32, U64, USIZE


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


class TokenJson(TypedDict):
    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillTokenJson(TypedDict):
    id: int
    text: str
    logprob: float | None


class BestOfSequence(TypedDict):
    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillTokenJson]
    tokens: list[TokenJson]
    top_tokens: NotRequired[list[list[TokenJson]]]


class Details(TypedDict):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillTokenJson]
    tokens: list[TokenJson]
    best_of_sequences: NotRequired[list[BestOfSequence]]
    top_tokens: NotRequired[list[list[TokenJson]]]


class GenerateResponse(TypedDict):
    generated_text: str
    details: NotRequired[Details]


class StreamDetails(TypedDict):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(TypedDict):
    index: int
    token: TokenJson
    top_tokens: NotRequired[list[TokenJson]]
    generated_text: str | None
    details: StreamDetails | None


class Info(TypedDict):
    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


class ErrorResponse(TypedDict):
    error: str
    error_type: str
