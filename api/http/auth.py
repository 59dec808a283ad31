"""The API key. Every route requires it, except the routes in `OPEN`, which are TGI's exceptions.

A newly added route is guarded by default.
"""

import hmac
from collections.abc import Callable, Iterable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from api.http.errors import response_to

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
    """ASGI middleware that answers 401 before the request's body is read, in the format of errors
    of the route. The key comes as TGI's and OpenAI's clients send it or as Anthropic's do.

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
        self._expected = {
            b"authorization": f"Bearer {key}".lower().encode(),
            b"x-api-key": key.lower().encode(),
        }
        self._is_served = is_served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._may_pass(scope):
            await self._app(scope, receive, send)
        else:
            await response_to(HTTPException(401), scope)(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if (method, scope["path"]) in self._open or not self._is_served(scope):
            return True
        return any(
            # TGI ignores case here, even in the key itself.
            hmac.compare_digest(value.lower(), self._expected[name])
            for name, value in scope["headers"]
            if name in self._expected
        )
