"""Turns a request body into an engine `Request`, or raises a `ValidationError` in TGI's words.

The checks are in TGI's order, as the client sees the first that fails. Nothing after this module
checks a request again.
"""

import asyncio
import secrets
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from api.generation.grammar import GrammarValidator, ToolSchemas
from api.generation.request import GenerateParameters, GenerateRequest
from api.http.errors import ValidationError
from api.settings.config import MAX_COUNTED_NEW_TOKENS, Limits
from engine.core.request import Request, SamplingParams, StoppingParams


class PromptTokenizer(Protocol):
    """The part of the engine's tokenizer that encodes prompts."""

    def encode(
        self, text: str, truncate: int | None = None, add_special_tokens: bool = True
    ) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Extras:
    """The parameters that the OpenAI routes have and TGI's own routes do not.

    frequency_penalty  as OpenAI means it: for each time that a token was generated
    raw_logprobs       logprobs are those of the model, before any parameter changes them
    any_schema         a JSON schema may have no `properties`, which TGI requires
    max_top_tokens     how many top tokens may be asked for, even if the settings allow fewer
    calls              the tools of which the text is a call
    prompt_ids         the tokens of the prompt, in place of `inputs`, which are then not read
    prompt_logprobs    tell the logprobs of the prompt, whatever the settings are
    prompt_top_tokens  how many alternatives to tell for each token of the prompt
    """

    add_special_tokens: bool = True
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    raw_logprobs: bool = False
    any_schema: bool = False
    max_top_tokens: int = 0
    calls: ToolSchemas = ()
    prompt_ids: Sequence[int] | None = None
    prompt_logprobs: bool = False
    prompt_top_tokens: int = 0


NO_EXTRAS = Extras()


class Validator:
    """Checks requests against fixed limits, and tokenises prompts in threads of its own."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        grammars: GrammarValidator,
        limits: Limits,
        vocab_size: int,
        num_workers: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._limits = limits
        self._vocab_size = vocab_size
        self._workers = ThreadPoolExecutor(num_workers, thread_name_prefix="validation")

    def close(self) -> None:
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._grammars.close()

    def check_best_of(self, best_of: int) -> None:
        """Check `best_of`, as TGI does before it takes a permit."""
        limit = self._limits.max_best_of
        if best_of <= 1:
            return
        if limit == 1:
            raise ValidationError(
                "`best_of` != 1 is not allowed for this endpoint", field="best_of"
            )
        if best_of > limit:
            raise ValidationError(
                f"`best_of` must be > 0 and <= {limit}. Given: {best_of}", field="best_of"
            )

    def check_streamable(self, parameters: GenerateParameters) -> None:
        """Check that a request can be streamed, as TGI does before it takes a permit."""
        if parameters.best_of not in (None, 1):
            raise ValidationError(
                "`best_of` != 1 is not supported when streaming tokens", field="best_of"
            )
        if parameters.decoder_input_details:
            raise ValidationError(
                "`decoder_input_details` == true is not supported when streaming tokens"
            )

    async def validate(
        self, body: GenerateRequest, extras: Extras = NO_EXTRAS, *, logprobs: bool
    ) -> Request:
        """Check `body` and return the engine's request. Raises ValidationError.

        `logprobs` tells whether the response shows logprobs or top tokens, or is chosen by them.
        """
        parameters = body.parameters
        self._check_parameters(parameters)
        self._check_top_n(parameters.top_n_tokens or 0, extras.max_top_tokens)
        self._check_extras(extras)
        prompt_ids = await self._prompt_ids(body, extras)
        self._check_length(len(prompt_ids), parameters.max_new_tokens)
        grammar = None
        if extras.calls:
            grammar = await self._grammars.validate_calls(extras.calls)
        elif parameters.grammar is not None:
            grammar = await self._grammars.validate(parameters.grammar, extras.any_schema)
        return Request(
            request_id=uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            sampling=_sampling(parameters, extras, logprobs),
            stopping=self._stopping(parameters, extras, len(prompt_ids)),
            grammar=grammar,
            prompt_logprobs=extras.prompt_logprobs
            or (parameters.decoder_input_details and self._limits.prefill_logprobs),
            prompt_top_tokens=extras.prompt_top_tokens,
        )

    def _check_parameters(self, parameters: GenerateParameters) -> None:
        best_of = parameters.best_of or 1
        if best_of > 1 and not _mentions_sampling(parameters):
            raise ValidationError("you must use sampling when `best_of` is > 1", field="best_of")
        _check_ranges(parameters)
        self._check_stop(parameters.stop)
        if best_of > 1 and parameters.seed is not None:
            raise ValidationError("`seed` must not be set when `best_of` > 1", field="seed")

    def _check_stop(self, stop: list[str]) -> None:
        limit = self._limits.max_stop_sequences
        if len(stop) > limit:
            raise ValidationError(
                f"`stop` supports up to {limit} stop sequences. Given: {len(stop)}", field="stop"
            )
        if "" in stop:  # TGI takes it, and ends after one token
            raise ValidationError("`stop` sequences cannot be empty", field="stop")

    def _check_top_n(self, top_n: int, least_limit: int) -> None:
        limit = max(self._limits.max_top_n_tokens, least_limit)
        if top_n > limit:
            raise ValidationError(
                f"`top_n_tokens` must be >= 0 and <= {limit}. Given: {top_n}", field="top_n_tokens"
            )

    def _check_inputs(self, body: GenerateRequest) -> None:
        truncate, limit = body.parameters.truncate, self._limits.max_input_tokens
        if not body.inputs:
            raise ValidationError("`inputs` cannot be empty", field="inputs")
        if truncate is not None and not 0 < truncate <= limit:
            raise ValidationError(
                f"`truncate` must be strictly positive and less than {limit}. Given: {truncate}"
            )

    def _check_extras(self, extras: Extras) -> None:
        _check_penalty("presence_penalty", extras.presence_penalty)
        _check_penalty("frequency_penalty", extras.frequency_penalty)
        self._check_tokens("logit_bias", [token_id for token_id, _ in extras.logit_bias])
        self._check_tokens("inputs", extras.prompt_ids or ())

    def _check_tokens(self, name: str, token_ids: Sequence[int]) -> None:
        highest = max(token_ids, default=0)
        if highest >= self._vocab_size:
            raise ValidationError(
                f"`{name}` must have token ids < {self._vocab_size}. Given: {highest}", field=name
            )

    async def _prompt_ids(self, body: GenerateRequest, extras: Extras) -> list[int]:
        if extras.prompt_ids is None:
            self._check_inputs(body)
            return await self._tokenise(
                body.inputs, body.parameters.truncate, extras.add_special_tokens
            )
        if not extras.prompt_ids:
            raise ValidationError("`inputs` cannot be empty", field="inputs")
        return list(extras.prompt_ids)

    async def count_tokens(self, body: GenerateRequest, extras: Extras) -> int:
        """Return the length of the prompt of `body`, however long it is. Raises ValidationError."""
        return len(await self._tokenise(body.inputs, None, extras.add_special_tokens))

    async def _tokenise(
        self, text: str, truncate: int | None, add_special_tokens: bool
    ) -> list[int]:
        loop = asyncio.get_running_loop()
        try:
            ids = await loop.run_in_executor(
                self._workers, self._tokenizer.encode, text, truncate, add_special_tokens
            )
        except Exception as error:
            raise ValidationError(f"tokenizer error {error}", field="inputs") from error
        if not ids:
            raise ValidationError("`inputs` cannot be empty", field="inputs")
        return ids

    def _check_length(self, num_input: int, max_new: int | None) -> None:
        limits = self._limits
        wanted = max(0, limits.max_total_tokens - num_input) if max_new is None else max_new
        counted = min(wanted, MAX_COUNTED_NEW_TOKENS)
        if num_input + counted > limits.max_total_tokens:
            raise ValidationError(
                f"`inputs` tokens + `max_new_tokens` must be <= {limits.max_total_tokens}. "
                f"Given: {num_input} `inputs` tokens and {counted} `max_new_tokens`",
                field="inputs",
                code="context_length_exceeded",
            )
        if num_input > limits.max_input_tokens:
            raise ValidationError(
                f"`inputs` must have less than {limits.max_input_tokens} tokens. "
                f"Given: {num_input}",
                field="inputs",
                code="context_length_exceeded",
            )

    def _stopping(
        self, parameters: GenerateParameters, extras: Extras, num_input: int
    ) -> StoppingParams:
        room = self._limits.max_total_tokens - num_input
        wanted = parameters.max_new_tokens
        return StoppingParams(
            max_new_tokens=room if wanted is None else min(wanted, room),
            stop=tuple(parameters.stop),
            ignore_eos=extras.ignore_eos,
        )


def random_seed() -> int:
    return secrets.randbits(64)


def _mentions_sampling(parameters: GenerateParameters) -> bool:
    """Tell whether `best_of` is allowed, even if the given values leave the engine greedy."""
    return parameters.temperature is not None or _samples(parameters)


def _samples(parameters: GenerateParameters) -> bool:
    return (
        parameters.do_sample
        or parameters.temperature not in (None, 1.0)
        or parameters.top_k is not None
        or parameters.top_p is not None
        or parameters.typical_p is not None
    )


def _check_ranges(parameters: GenerateParameters) -> None:
    _check_positive("temperature", parameters.temperature)
    _check_positive("repetition_penalty", parameters.repetition_penalty)
    _check_penalty("frequency_penalty", parameters.frequency_penalty)
    _check_open_unit("top_p", parameters.top_p)
    _check_open_unit("typical_p", parameters.typical_p)
    _check_positive("top_k", parameters.top_k)
    _check_positive("max_new_tokens", parameters.max_new_tokens)


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise ValidationError(f"`{name}` must be strictly positive", field=name)


def _check_penalty(name: str, value: float | None) -> None:
    if value is not None and not -2.0 <= value <= 2.0:
        raise ValidationError(f"`{name}` must be >= -2.0 and <= 2.0", field=name)


def _check_open_unit(name: str, value: float | None) -> None:
    if value is not None and not 0.0 < value < 1.0:
        raise ValidationError(f"`{name}` must be > 0.0 and < 1.0", field=name)


def _sampling(parameters: GenerateParameters, extras: Extras, logprobs: bool) -> SamplingParams:
    return SamplingParams(
        do_sample=_samples(parameters),
        temperature=_or(parameters.temperature, 1.0),
        top_k=parameters.top_k or 0,
        top_p=_or(parameters.top_p, 1.0),
        typical_p=_or(parameters.typical_p, 1.0),
        repetition_penalty=_or(parameters.repetition_penalty, 1.0),
        frequency_penalty=parameters.frequency_penalty or 0.0,
        presence_penalty=extras.presence_penalty,
        output_frequency_penalty=extras.frequency_penalty,
        logit_bias=extras.logit_bias,
        seed=random_seed() if parameters.seed is None else parameters.seed,
        logprobs=logprobs,
        top_n_tokens=(parameters.top_n_tokens or 0) if logprobs else 0,
        raw_logprobs=extras.raw_logprobs,
        watermark=parameters.watermark,
    )


def _or(value: float | None, neutral: float) -> float:
    return neutral if value is None else value
