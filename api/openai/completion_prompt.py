"""The translation of a completion to generations, one for each of its prompts."""

import asyncio
from dataclasses import dataclass, replace
from typing import Protocol

from api.generation.request import GenerateRequest
from api.generation.validation import Extras
from api.http.errors import Refused, ValidationError
from api.openai.parameters import check, check_range, extras, generate_parameters
from api.openai.requests import CompletionRequest
from api.settings.config import Settings


class Decoder(Protocol):
    """The part of the engine's tokenizer that decodes tokens."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class CompletionPrompt:
    """A prompt as a generation. `echo` is the text to repeat before the completion, or empty."""

    request: GenerateRequest
    extras: Extras
    echo: str


async def prepare_prompts(
    body: CompletionRequest, settings: Settings, tokenizer: Decoder
) -> list[CompletionPrompt]:
    """Check and translate `body`. Raises ValidationError or Refused."""
    _check(body, settings)
    parameters = generate_parameters(
        body, repetition_penalty=body.repetition_penalty, top_n_tokens=body.logprobs
    ).model_copy(update={"max_new_tokens": 1} if body.token_limit == 0 else None)
    common = extras(body, add_special_tokens=True)
    if body.echo and body.logprobs is not None:
        common = replace(common, prompt_logprobs=True, prompt_top_tokens=body.logprobs)
    return [
        CompletionPrompt(
            request=GenerateRequest(
                inputs=prompt if isinstance(prompt, str) else "", parameters=parameters
            ),
            extras=common if isinstance(prompt, str) else replace(common, prompt_ids=prompt),
            echo=await _text(prompt, tokenizer) if body.echo else "",
        )
        for prompt in body.prompt
    ]


async def _text(prompt: str | list[int], tokenizer: Decoder) -> str:
    if isinstance(prompt, str):
        return prompt
    return await asyncio.to_thread(tokenizer.decode, prompt, skip_special_tokens=False)


def _check(body: CompletionRequest, settings: Settings) -> None:
    if len(body.prompt) > settings.max_client_batch_size:
        raise Refused(
            422,
            "Number of prompts exceeds the maximum allowed batch size of "
            f"{settings.max_client_batch_size}",
            "batch size exceeded",
            field="prompt",
        )
    most = settings.max_concurrent_requests // len(body.prompt)
    check(body, most)
    n = body.n or 1
    if body.best_of is None:
        return
    check_range("best_of", body.best_of, n, max(n, min(settings.max_best_of, most)))
    if body.best_of > n and body.stream:
        raise ValidationError("`best_of` > `n` cannot be streamed", field="best_of")
