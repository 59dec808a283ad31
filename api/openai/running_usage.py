"""The usage so far in every chunk of a stream, for clients that ask for it as vLLM has it."""

import asyncio

from api.generation.request import GenerateRequest
from api.generation.validation import Extras, Tokenizer
from api.openai.payloads import usage_of
from api.openai.requests import OpenAIRequest
from api.openai.responses import Usage


class RunningUsage:
    """Counts the prompt itself: the engine tells its length with the last token only."""

    def __init__(self, tokenizer: Tokenizer, request: GenerateRequest, extras: Extras) -> None:
        self._prompt = tokenizer, request.inputs, extras.add_special_tokens
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0

    async def begin(self) -> None:
        """When the first token is there, so that the prompt is known to be a valid one."""
        if not self._num_prompt_tokens:
            tokenizer, text, special = self._prompt
            ids = await asyncio.to_thread(tokenizer.encode, text, None, special)
            self._num_prompt_tokens = len(ids)

    def push(self) -> Usage:
        """With one more token."""
        self._num_generated_tokens += 1
        return usage_of(self._num_prompt_tokens, self._num_generated_tokens)


def running_usage(
    tokenizer: Tokenizer, body: OpenAIRequest, request: GenerateRequest, extras: Extras
) -> RunningUsage | None:
    if not body.has_usage_in_every_chunk:
        return None
    return RunningUsage(tokenizer, request, extras)
