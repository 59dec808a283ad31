"""The translation of OpenAI's parameters to TGI's, and the checks of those that TGI has not."""

from api.generation.request import GenerateParameters, GrammarType
from api.generation.validation import Extras
from api.http.errors import ValidationError
from api.http.serde import U64_MAX
from api.openai.requests import OpenAIRequest

_MAX_CHOICES = 128
_MAX_BIAS = 100.0


def check(body: OpenAIRequest, max_concurrent: int) -> None:
    """Raise ValidationError for a field that is out of range or cannot be served.

    `max_concurrent` is the most generations that may run at once.
    """
    for field in body.unsupported:
        if getattr(body, field):
            raise ValidationError(
                f"`{field}` is not supported", field=field, code="unsupported_parameter"
            )
    if body.stream_options is not None and not body.stream:
        raise ValidationError(
            "`stream_options` is only allowed when `stream` is true", field="stream_options"
        )
    limit = min(_MAX_CHOICES, max_concurrent)
    check_range("n", body.n, 1, limit)
    check_range("top_p", body.top_p, 0.0, 1.0)
    check_range("temperature", body.temperature, 0.0, float("inf"))
    for bias in (body.logit_bias or {}).values():
        check_range("logit_bias", bias, -_MAX_BIAS, _MAX_BIAS)


def check_range(field: str, value: float | None, low: float, high: float) -> None:
    """Raise ValidationError if `value` is given and is out of range."""
    if value is not None and not low <= value <= high:
        bounds = f">= {low}" if high == float("inf") else f">= {low} and <= {high}"
        raise ValidationError(f"`{field}` must be {bounds}. Given: {value}", field=field)


def generate_parameters(
    body: OpenAIRequest,
    repetition_penalty: float | None = None,
    top_n_tokens: int | None = None,
    grammar: GrammarType | None = None,
) -> GenerateParameters:
    """Translate `body` to TGI's parameters. `model` is ignored, as only one model is served.

    These routes sample unless the temperature or the `top_p` is 0; TGI's own routes are greedy by
    default.
    """
    greedy = body.temperature == 0.0 or body.top_p == 0.0
    return GenerateParameters(
        temperature=None if greedy else body.temperature,
        repetition_penalty=repetition_penalty,
        top_p=None if greedy or body.top_p == 1.0 else body.top_p,
        do_sample=not greedy,
        max_new_tokens=body.token_limit,
        stop=body.stop,
        details=True,
        seed=None if body.seed is None else body.seed & U64_MAX,
        top_n_tokens=top_n_tokens,
        grammar=grammar,
    )


def extras(body: OpenAIRequest, add_special_tokens: bool, any_schema: bool = False) -> Extras:
    """Return the parameters that only these routes have."""
    bias = {int(token_id): value for token_id, value in (body.logit_bias or {}).items()}
    return Extras(
        add_special_tokens=add_special_tokens,
        ignore_eos=bool(body.ignore_eos),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple(bias.items()),
        raw_logprobs=True,
        any_schema=any_schema,
    )
