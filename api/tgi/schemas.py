"""The JSON of TGI's responses: typed dicts in the key order of its wire.

They are typed dicts because one is built for each token, and a pydantic model costs eight times
as much (4.9 µs against 0.6).
"""

from typing import NotRequired

from typing_extensions import TypedDict


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
