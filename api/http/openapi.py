"""The OpenAPI document. Routes parse their bodies themselves, so FastAPI does not know the body
models; they are added here.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

REF = "#/components/schemas/{model}"


def describe(app: FastAPI, bodies: dict[str, type[BaseModel]]) -> dict[str, Any]:
    """Return the OpenAPI document of `app`. `bodies` has the body model of each POST path."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, definitions = models_json_schema(
        [(model, "validation") for model in bodies.values()], ref_template=REF
    )
    document["components"]["schemas"].update(definitions["$defs"])
    for path, model in bodies.items():
        schema = {"$ref": REF.format(model=model.__name__)}
        document["paths"][path]["post"]["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return document
