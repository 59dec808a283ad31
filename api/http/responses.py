"""JSON answers, on every route that has one."""

from collections.abc import Mapping

import orjson
from starlette.responses import Response


def json_response(payload: object, headers: Mapping[str, str] | None = None) -> Response:
    content = orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, headers=headers, media_type="application/json")
