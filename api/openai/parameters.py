"""The translation of OpenAI's parameters to TGI's."""

from api.generation.request import GenerateParameters, GrammarType
from api.generation.validation import Extras
from api.openai.requests import OpenAIRequest


def generate_parameters(
    body: OpenAIRequest,
    repetition_penalty: float | None = None,
    top_n_tokens: int | None = None,
    grammar: GrammarType | None = None,
) -> GenerateParameters:
    """Translate `body` to TGI's parameters. `model` is ignored, as only one model is served.

    These routes sample unless the temperature is 0; TGI's own routes are greedy by default.
    """
    greedy = body.temperature == 0.0
    newer = body.max_completion_tokens
    return GenerateParameters(
        temperature=None if greedy else body.temperature,
        repetition_penalty=repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        top_p=None if body.top_p == 1.0 else body.top_p,
        do_sample=not greedy,
        max_new_tokens=body.max_tokens if newer is None else newer,
        stop=body.stop,
        details=True,
        seed=body.seed,
        top_n_tokens=top_n_tokens,
        grammar=grammar,
    )


def extras(body: OpenAIRequest, add_special_tokens: bool, any_schema: bool = False) -> Extras:
    """Return the parameters that only these routes have."""
    return Extras(
        add_special_tokens=add_special_tokens,
        ignore_eos=bool(body.ignore_eos),
        presence_penalty=body.presence_penalty or 0.0,
        any_schema=any_schema,
    )
