"""Turns a request body into an engine `Request`, or raises a `ValidationError` in TGI's words.

The checks are in TGI's order, as the client sees the first that fails. Nothing after this module
checks a request again.
"""

import secrets
import uuid
from dataclasses import dataclass
from typing import Protocol

from api.generation.grammar import GrammarValidator
from api.generation.request import GenerateParameters, GenerateRequest
from api.http.errors import ValidationError
from api.http.off_loop import Threads
from api.settings.config import MAX_COUNTED_NEW_TOKENS, Limits
from engine.core.request import Request, SamplingParams, StoppingParams

_SHORT_TEXT = 1 << 16
"""Characters up to which a prompt counts as short, and takes a few milliseconds to tokenise."""


class PromptTokenizer(Protocol):
    """The part of the engine's tokenizer that encodes prompts."""

    def encode(
        self, text: str, truncate: int | None = None, add_special_tokens: bool = True
    ) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Extras:
    """The parameters that the OpenAI routes have and TGI's own routes do not."""

    add_special_tokens: bool = True
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    any_schema: bool = False
    """Whether a JSON schema may have no `properties`, which TGI requires."""


NO_EXTRAS = Extras()


class Validator:
    """Checks requests against fixed limits, and tokenises prompts in threads of its own."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        grammars: GrammarValidator,
        limits: Limits,
        num_workers: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._limits = limits
        self._workers = Threads(num_workers, "validation")
        self._long_text_workers = Threads(num_workers, "validation-of-long")

    def close(self) -> None:
        self._workers.close()
        self._long_text_workers.close()
        self._grammars.close()

    def check_best_of(self, best_of: int) -> None:
        """Check `best_of`, as TGI does before it takes a permit."""
        limit = self._limits.max_best_of
        if best_of <= 1:
            return
        if limit == 1:
            raise ValidationError("`best_of` != 1 is not allowed for this endpoint")
        if best_of > limit:
            raise ValidationError(f"`best_of` must be > 0 and <= {limit}. Given: {best_of}")

    def check_streamable(self, parameters: GenerateParameters) -> None:
        """Check that a request can be streamed, as TGI does before it takes a permit."""
        if parameters.best_of not in (None, 1):
            raise ValidationError("`best_of` != 1 is not supported when streaming tokens")
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
        _check_penalty("presence_penalty", extras.presence_penalty)
        self._check_inputs(body)
        prompt_ids = await self._tokenise(
            body.inputs, parameters.truncate, extras.add_special_tokens
        )
        self._check_length(len(prompt_ids), parameters.max_new_tokens)
        grammar = None
        if parameters.grammar is not None:
            grammar = await self._grammars.validate(parameters.grammar, extras.any_schema)
        return Request(
            request_id=uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            sampling=_sampling(parameters, extras, logprobs),
            stopping=self._stopping(parameters, extras, len(prompt_ids)),
            grammar=grammar,
            prompt_logprobs=parameters.decoder_input_details and self._limits.prefill_logprobs,
        )

    def _check_parameters(self, parameters: GenerateParameters) -> None:
        best_of = parameters.best_of or 1
        if best_of > 1 and not _mentions_sampling(parameters):
            raise ValidationError("you must use sampling when `best_of` is > 1")
        _check_ranges(parameters)
        self._check_stop(parameters.stop)
        if best_of > 1 and parameters.seed is not None:
            raise ValidationError("`seed` must not be set when `best_of` > 1")
        self._check_top_n(parameters.top_n_tokens or 0)

    def _check_stop(self, stop: list[str]) -> None:
        limit = self._limits.max_stop_sequences
        if len(stop) > limit:
            raise ValidationError(
                f"`stop` supports up to {limit} stop sequences. Given: {len(stop)}"
            )

    def _check_top_n(self, top_n: int) -> None:
        limit = self._limits.max_top_n_tokens
        if top_n > limit:
            raise ValidationError(f"`top_n_tokens` must be >= 0 and <= {limit}. Given: {top_n}")

    def _check_inputs(self, body: GenerateRequest) -> None:
        truncate, limit = body.parameters.truncate, self._limits.max_input_tokens
        if not body.inputs:
            raise ValidationError("`inputs` cannot be empty")
        if truncate is not None and not 0 < truncate <= limit:
            raise ValidationError(
                f"`truncate` must be strictly positive and less than {limit}. Given: {truncate}"
            )

    async def _tokenise(
        self, text: str, truncate: int | None, add_special_tokens: bool
    ) -> list[int]:
        # Apart, so that other prompts do not wait for seconds.
        workers = self._workers if len(text) <= _SHORT_TEXT else self._long_text_workers
        try:
            ids = await workers.run(self._tokenizer.encode, text, truncate, add_special_tokens)
        except Exception as error:
            raise ValidationError(f"tokenizer error {error}") from error
        if not ids:
            raise ValidationError("`inputs` cannot be empty")
        return ids

    def _check_length(self, num_input: int, max_new: int | None) -> None:
        limits = self._limits
        wanted = max(0, limits.max_total_tokens - num_input) if max_new is None else max_new
        counted = min(wanted, MAX_COUNTED_NEW_TOKENS)
        if num_input + counted > limits.max_total_tokens:
            raise ValidationError(
                f"`inputs` tokens + `max_new_tokens` must be <= {limits.max_total_tokens}. "
                f"Given: {num_input} `inputs` tokens and {counted} `max_new_tokens`"
            )
        if num_input > limits.max_input_tokens:
            raise ValidationError(
                f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {num_input}"
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
        raise ValidationError(f"`{name}` must be strictly positive")


def _check_penalty(name: str, value: float | None) -> None:
    if value is not None and not -2.0 <= value <= 2.0:
        raise ValidationError(f"`{name}` must be >= -2.0 and <= 2.0")


def _check_open_unit(name: str, value: float | None) -> None:
    if value is not None and not 0.0 < value < 1.0:
        raise ValidationError(f"`{name}` must be > 0.0 and < 1.0")


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
        seed=random_seed() if parameters.seed is None else parameters.seed,
        logprobs=logprobs,
        top_n_tokens=(parameters.top_n_tokens or 0) if logprobs else 0,
        watermark=parameters.watermark,
    )


def _or(value: float | None, neutral: float) -> float:
    return neutral if value is None else value
