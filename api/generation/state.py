"""The objects that all routes share. They are built once, before the first request."""

import re
from dataclasses import dataclass

from starlette.requests import Request

from api.generation.grammar import GrammarValidator
from api.generation.inference import Inference
from api.generation.validation import Validator
from api.settings.config import Limits, Settings
from api.telemetry.observation import Observer, observer_for
from engine.async_engine import AsyncEngine


@dataclass(frozen=True, slots=True)
class AppState:
    """The objects that all routes share."""

    engine: AsyncEngine
    settings: Settings
    limits: Limits
    validator: Validator
    inference: Inference
    observer: Observer
    compute_type: str


def build_state(engine: AsyncEngine, settings: Settings) -> AppState:
    limits = settings.limits(engine.max_total_tokens)
    validator = Validator(
        engine.tokenizer,
        GrammarValidator(None if settings.disable_grammar_support else engine.grammars),
        limits,
        engine.model.vocab_size,
        settings.validation_workers,
    )
    observer = observer_for(engine, limits, settings.otlp_endpoint, settings.otlp_service_name)
    engine.on_step = observer.step
    return AppState(
        engine=engine,
        settings=settings,
        limits=limits,
        validator=validator,
        inference=Inference(engine, validator, observer),
        observer=observer,
        compute_type=settings.compute_type or f"1-{_slug(engine.model.device)}",
    )


def state_of(request: Request) -> AppState:
    state = request.app.state.serving
    assert isinstance(state, AppState)
    return state


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
