"""OpenAI's parameters become TGI's."""

from pydantic import JsonValue

from api.generation.request import GenerateParameters, GrammarType
from api.generation.validation import Extras
from api.openai.requests import OpenAIRequest, ResponseFormat

ANY_OBJECT: dict[str, JsonValue] = {"type": "object"}
SERVED_MODEL = "tgi"
"""Clients that need some name for the one model that there is send this."""


def generate_parameters(
    body: OpenAIRequest,
    repetition_penalty: float | None = None,
    top_n_tokens: int | None = None,
    grammar: GrammarType | None = None,
) -> GenerateParameters:
    """Greedy at a temperature of 0 only, where TGI's own routes are greedy by default."""
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
        adapter_id=None if body.model == SERVED_MODEL else body.model,
    )


def extras(body: OpenAIRequest, add_special_tokens: bool, any_schema: bool = False) -> Extras:
    return Extras(
        add_special_tokens=add_special_tokens,
        ignore_eos=bool(body.ignore_eos),
        presence_penalty=body.presence_penalty or 0.0,
        any_schema=any_schema,
    )


def format_grammar(wanted: ResponseFormat | None) -> tuple[GrammarType | None, bool]:
    """The grammar, and whether it may be any schema: OpenAI's need not list properties."""
    if wanted is None or wanted.type == "text":
        return None, False
    if wanted.type == "json_schema" and wanted.json_schema is not None:
        schema = wanted.json_schema.schema_
        return GrammarType(type="json", value=ANY_OBJECT if schema is None else schema), True
    if wanted.type == "json_object" and wanted.value is None:
        return GrammarType(type="json", value=ANY_OBJECT), True
    return GrammarType(type=wanted.type, value=wanted.value), False
