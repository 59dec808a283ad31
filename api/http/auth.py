"""The API key. Every route requires it, except the routes in `OPEN`, which are TGI's exceptions.

A newly added route is guarded by default.
"""

import hmac
from collections.abc import Callable, Iterable

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN = frozenset(
    {
        ("GET", "/"),
        ("GET", "/health"),
        ("GET", "/ping"),
        ("GET", "/info"),
        ("GET", "/metrics"),
        ("GET", "/v1/models"),
        ("GET", "/docs"),
        ("GET", "/api-doc/openapi.json"),
        ("POST", "/chat_tokenize"),
    }
)
"""Method and path of the routes that are served without the key."""


class ApiKey:
    """ASGI middleware that answers 401 without a body, before the request's body is read.

    Requests for which `is_served` is False pass through to be answered 404, as in TGI. `guarded`
    are routes of `OPEN` that require the key after all.
    """

    def __init__(
        self,
        app: ASGIApp,
        key: str,
        is_served: Callable[[Scope], bool],
        guarded: Iterable[tuple[str, str]] = (),
    ) -> None:
        self._app = app
        self._open = OPEN - set(guarded)
        self._expected = f"Bearer {key}".lower().encode()
        self._is_served = is_served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._may_pass(scope):
            await self._app(scope, receive, send)
        else:
            await Response(status_code=401)(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if (method, scope["path"]) in self._open or not self._is_served(scope):
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        # TGI ignores case here, even in the key itself.
        return hmac.compare_digest(given.lower(), self._expected)
