"""The JSON response of every route."""

from collections.abc import Mapping

import orjson
from starlette.responses import Response


def json_response(payload: object, headers: Mapping[str, str] | None = None) -> Response:
    """Return `payload` as JSON. It may contain numpy numbers and arrays."""
    content = orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, headers=headers, media_type="application/json")
