"""The OpenAPI document. Routes read their own bodies, so their models are added here."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

REF = "#/components/schemas/{model}"


def describe(app: FastAPI, bodies: dict[str, type[BaseModel]]) -> dict[str, Any]:
    """The document of `app`, whose POST routes take `bodies` by path."""
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
