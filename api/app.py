"""The application: routes, error handlers and the engine's life around them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial

from fastapi import FastAPI

from api import errors, openai, openapi, platforms, tgi, tokenize
from api.state import AppState

_ROOMS = (tgi, openai, tokenize, platforms)
"""Each has a router, and the bodies of its POST routes for the OpenAPI document."""


def create_app(state: AppState) -> FastAPI:
    app = FastAPI(
        title="Skiff",
        version=tgi.TGI_VERSION,
        openapi_url="/api-doc/openapi.json",
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.serving = state
    for room in _ROOMS:
        app.include_router(room.router)
    bodies = {path: model for room in _ROOMS for path, model in room.BODIES.items()}
    errors.install_handlers(app)
    app.openapi = cache(partial(openapi.describe, app, bodies))  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: AppState = app.state.serving
    state.engine.start()
    yield
    await state.engine.stop()
    state.validator.close()
