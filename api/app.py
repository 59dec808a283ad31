"""The application: routes, error handlers and the engine's life around them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial

from fastapi import FastAPI
from starlette.routing import Match
from starlette.types import Scope

from api import platforms, tokenize
from api.generation.contract import TGI_VERSION
from api.generation.state import AppState
from api.http import errors, openapi
from api.http.auth import ApiKey
from api.http.cors import Cors
from api.openai import routes as openai
from api.tgi import prometheus
from api.tgi import routes as tgi

_ROOMS = (tgi, openai, tokenize, platforms)
"""Each has a router, and the bodies of its POST routes for the OpenAPI document."""


def create_app(state: AppState) -> FastAPI:
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
    for room in _ROOMS:
        app.include_router(room.router)
    app.include_router(prometheus.router)
    bodies = {path: model for room in _ROOMS for path, model in room.BODIES.items()}
    errors.install_handlers(app)
    app.openapi = cache(partial(openapi.describe, app, bodies))  # type: ignore[method-assign]
    settings = state.settings
    if settings.api_key is not None:
        key = settings.api_key.get_secret_value()
        app.add_middleware(ApiKey, key=key, is_served=partial(_is_served, app))
    # Around what answers 500 for a fault of ours: a page must be able to read that, too.
    app.middleware_stack = Cors(app.build_middleware_stack(), settings.cors_allow_origin)
    return app


def _is_served(app: FastAPI, scope: Scope) -> bool:
    """By any method."""
    return any(route.matches(scope)[0] is not Match.NONE for route in app.routes)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: AppState = app.state.serving
    state.engine.start()
    yield
    await state.engine.stop()
    state.validator.close()
    await asyncio.to_thread(state.observer.close)
