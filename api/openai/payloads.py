"""The JSON that all OpenAI routes have in common: names, finish reasons, usage."""

import time
import uuid

from api.generation.contract import TGI_VERSION
from api.generation.state import AppState
from api.openai.responses import CompletionHead, Usage
from engine.core.request import Finished, FinishReason

SYSTEM_FINGERPRINT = f"{TGI_VERSION}-native"

_ANY_MODEL = "tgi"
"""The model's name that clients send if they must send one and do not know it."""

_FINISH_REASONS = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
}


def finish_reason(end: Finished) -> str:
    """Return OpenAI's finish reason of a text: `stop` also if the last token that the limit allows
    completed a stop string.
    """
    return "stop" if end.stop is not None else _FINISH_REASONS[end.reason]


def new_id(prefix: str) -> str:
    """Return an id for one answer, which all of its chunks have."""
    return f"{prefix}-{uuid.uuid4().hex}"


def created_and_model(state: AppState, model: str | None = None) -> tuple[int, str]:
    """Return the time and the model's name, which a response repeats in all its chunks.

    The name is `model`, as the request gave it, or that of the served model.
    """
    served = state.engine.model.model_id
    return int(time.time()), served if model in (None, _ANY_MODEL) else model


def completion_head(state: AppState) -> CompletionHead:
    """Return what an answer to a completion begins with, which all of its chunks repeat."""
    created, model = created_and_model(state)
    return {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": created,
        "model": model,
        "system_fingerprint": SYSTEM_FINGERPRINT,
    }


def usage(num_prompt_tokens: int, num_generated_tokens: int) -> Usage:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated_tokens,
        "total_tokens": num_prompt_tokens + num_generated_tokens,
    }
