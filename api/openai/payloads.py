"""The JSON that all OpenAI routes have in common: finish reasons, usage, logprobs, errors."""

import time
import uuid

from api.generation.contract import TGI_VERSION
from api.generation.state import AppState
from api.openai.responses import Usage
from engine.core.request import Finished, FinishReason, Request

SYSTEM_FINGERPRINT = f"{TGI_VERSION}-native"

_ANY_MODEL = "tgi"
"""The model's name that clients send if they must send one and do not know it."""

FINISH_REASONS = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
}
"""OpenAI's finish reasons of a text. That of a call is `tool_calls`."""


class RunningUsage:
    """Counts the usage so far, for streams that report it in every chunk as vLLM does."""

    def __init__(self) -> None:
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0

    def begin(self, request: Request) -> None:
        """Take the length of the prompt, which the engine reports with the last token only."""
        self._num_prompt_tokens = len(request.prompt_ids)

    def add_token(self) -> Usage:
        """Count one more token and return the usage with it."""
        self._num_generated_tokens += 1
        return _usage(self._num_prompt_tokens, self._num_generated_tokens)


def new_id(prefix: str) -> str:
    """Return an id for one answer, which all of its chunks have."""
    return f"{prefix}-{uuid.uuid4().hex}"


def created_and_model(state: AppState, model: str | None = None) -> tuple[int, str]:
    """Return the time and the model's name, which a response repeats in all its chunks.

    The name is `model`, as the request gave it, or that of the served model.
    """
    served = state.engine.model.model_id
    return int(time.time()), served if model in (None, _ANY_MODEL) else model


def total_usage(*ends: Finished) -> Usage:
    """Return the usage of all generations of a request."""
    return _usage(
        sum(end.num_prompt_tokens for end in ends), sum(end.num_generated_tokens for end in ends)
    )


def _usage(num_prompt_tokens: int, num_generated_tokens: int) -> Usage:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated_tokens,
        "total_tokens": num_prompt_tokens + num_generated_tokens,
    }
