"""/health, /info, the OpenAPI document, and the start and the stop of the engine."""

import pytest

from engine.core.metrics import EngineState
from tests.api.client import client, make_app
from tests.api.scripted import ScriptedEngine

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("path", ["/health", "/", "/ping"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_health_is_200_and_empty(method: str, path: str) -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.request(method, path)
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("state", ["stalled", "dead"])
async def test_health_is_503_with_the_reason(state: EngineState) -> None:
    engine = ScriptedEngine()
    engine.state, engine.reason = state, "no step for 61 s"
    async with client(engine) as http:
        answer = await http.get("/health")
    assert answer.status_code == 503
    assert answer.content == (
        b'{"error":"unhealthy","error_type":"healthcheck","reason":"no step for 61 s"}'
    )


async def test_info_has_the_model_and_the_limits() -> None:
    async with client(ScriptedEngine(), max_input_tokens=1000) as http:
        answer = await http.get("/info")
    assert answer.content == (
        b'{"model_id":"org/model","model_sha":"abc123","model_pipeline_tag":"text-generation",'
        b'"max_concurrent_requests":128,"max_best_of":2,"max_stop_sequences":4,'
        b'"max_input_tokens":1000,"max_total_tokens":2048,"validation_workers":2,'
        b'"max_client_batch_size":4,"router":"text-generation-router","version":"3.3.6-dev0",'
        b'"sha":null,"docker_label":null}'
    )


async def test_the_openapi_document_has_the_request_models() -> None:
    async with client(ScriptedEngine()) as http:
        document = (await http.get("/api-doc/openapi.json")).json()
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/GenerateRequest"}
    schemas = document["components"]["schemas"]
    assert schemas["GenerateRequest"]["required"] == ["inputs"]
    assert schemas["GenerateParameters"]["properties"]["temperature"]["default"] is None
    assert {"GenerateResponse", "StreamResponse"} <= schemas.keys()


async def test_the_engine_starts_and_stops_with_the_application() -> None:
    engine = ScriptedEngine()
    app = make_app(engine)
    async with app.router.lifespan_context(app):
        assert (engine.num_starts, engine.num_stops) == (1, 0)
    assert (engine.num_starts, engine.num_stops) == (1, 1)
