"""The application: its routes, its error handlers, and the start and the stop of the engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial

from fastapi import FastAPI
from starlette.routing import Match
from starlette.types import Scope

from api import platforms, tokenize
from api.anthropic import errors as anthropic_errors
from api.anthropic import routes as anthropic
from api.generation.contract import TGI_VERSION
from api.generation.state import AppState
from api.http import errors, openapi
from api.http.auth import ApiKey
from api.http.cors import Cors
from api.openai import errors as openai_errors
from api.openai import routes as openai
from api.responses import routes as responses
from api.tgi import prometheus
from api.tgi import routes as tgi

_ROUTE_MODULES = (tgi, openai, responses, anthropic, tokenize, platforms)
"""Each module has a `router`, and the `BODIES` of its POST routes for the OpenAPI document."""
_ERROR_FORMATS = (
    anthropic_errors.ERROR_FORMATS | responses.ERROR_FORMATS | openai_errors.ERROR_FORMATS
)
"""The format of errors of the paths that begin with a prefix; the first that fits counts."""

_STOP_S = 0.4
"""Seconds that the engine's current step may take at the end, when no request waits for it."""


def create_app(state: AppState) -> FastAPI:
    """Build the application. It starts and stops the engine of `state`."""
    app = FastAPI(
        title="Skiff",
        version=TGI_VERSION,
        openapi_url="/api-doc/openapi.json",
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.serving = state
    for module in _ROUTE_MODULES:
        app.include_router(module.router)
    app.include_router(prometheus.router)
    bodies = {path: model for module in _ROUTE_MODULES for path, model in module.BODIES.items()}
    errors.install_handlers(app, _ERROR_FORMATS)
    app.openapi = cache(partial(openapi.describe, app, bodies))  # type: ignore[method-assign]
    settings = state.settings
    if settings.api_key is not None:
        key = settings.api_key.get_secret_value()
        guarded = [("POST", "/chat_tokenize")] if settings.api_key_for_chat_tokenize else []
        is_served = partial(_is_served, app)
        app.add_middleware(ApiKey, key=key, is_served=is_served, guarded=guarded)
    # Outside the middleware that answers 500 after a bug, so that a web page can read that, too.
    app.middleware_stack = Cors(app.build_middleware_stack(), settings.cors_allow_origin)
    return app


def _is_served(app: FastAPI, scope: Scope) -> bool:
    """Tell whether there is a route for the path of `scope`, for whatever method."""
    return any(route.matches(scope)[0] is not Match.NONE for route in app.routes)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: AppState = app.state.serving
    state.engine.start()
    yield
    await state.engine.stop(_STOP_S)
    state.validator.close()
    await asyncio.to_thread(state.observer.close)
