"""The API key: whatever is served is for who has it, save what is named here.

A route that is added is guarded without anyone's doing. The exceptions are TGI's.
"""

import hmac
from collections.abc import Callable

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
"""What is served without the key, by method and path."""


class ApiKey:
    """Answers 401 without a body before anything of a request's own is read.

    Paths that `is_served` does not know are let through, to be answered 404 as in TGI.
    """

    def __init__(self, app: ASGIApp, key: str, is_served: Callable[[Scope], bool]) -> None:
        self._app = app
        self._expected = f"Bearer {key}".lower().encode()
        self._is_served = is_served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._may_pass(scope):
            await self._app(scope, receive, send)
        else:
            await Response(status_code=401)(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if (method, scope["path"]) in OPEN or not self._is_served(scope):
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        # Without regard to case, the key's own included: TGI compares so.
        return hmac.compare_digest(given.lower(), self._expected)
