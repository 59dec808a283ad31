"""What the JSON of all OpenAI routes has in common: reasons, usage, logprobs, errors."""

import time
from typing import NamedTuple

from api.generation.contract import TGI_VERSION, f32
from api.generation.state import AppState
from api.http import sse
from api.http.errors import wire_error
from api.openai.parameters import SERVED_MODEL
from api.openai.responses import Logprobs, TokenLogprob, Usage
from engine.core.request import Finished, FinishReason, TokenOutput

SYSTEM_FINGERPRINT = f"{TGI_VERSION}-native"

FINISH_REASONS = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop_sequence",
}
"""TGI's. OpenAI's would have a stop sequence end with `stop`, and a call with `tool_calls`."""


class Envelope(NamedTuple):
    """What every answer and every chunk of a stream repeats."""

    created: int
    model: str


def envelope(state: AppState, model: str | None = None) -> Envelope:
    """`model` as the request named it, where the answer repeats that."""
    served = state.engine.model.model_id
    return Envelope(int(time.time()), served if model in (None, SERVED_MODEL) else model)


def usage(*ends: Finished) -> Usage:
    return usage_of(
        sum(end.num_prompt_tokens for end in ends), sum(end.num_generated_tokens for end in ends)
    )


def usage_of(num_prompt_tokens: int, num_generated_tokens: int) -> Usage:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated_tokens,
        "total_tokens": num_prompt_tokens + num_generated_tokens,
    }


def logprobs(outputs: list[TokenOutput]) -> Logprobs:
    return {"content": [_token_logprob(output) for output in outputs]}


def _token_logprob(output: TokenOutput) -> TokenLogprob:
    return {
        "token": output.token.text,
        "logprob": f32(output.token.logprob),
        "top_logprobs": [
            {"token": top.text, "logprob": f32(top.logprob)} for top in output.top_tokens
        ],
    }


def error_event(problem: Exception) -> bytes:
    """In a stream, whatever went wrong is a 422 to TGI."""
    return sse.event({"error": {"message": wire_error(problem).error, "http_status_code": 422}})
