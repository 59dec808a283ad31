"""The one model that is served, as OpenAI's clients ask for it."""

import pytest

from tests.api.client import client
from tests.api.scripted import ScriptedEngine

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("path", ["/v1/models/org/model", "/v1/models/org%2Fmodel"])
async def test_the_model_is_found_by_its_name(path: str) -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.get(path)
        listed = (await http.get("/v1/models")).json()["data"]
    assert answer.status_code == 200
    assert listed == [answer.json()]
    assert answer.json()["id"] == "org/model"


@pytest.mark.parametrize("name", ["gpt-4o", "org", "org/model/x"])
async def test_another_model_is_not_found(name: str) -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.get(f"/v1/models/{name}")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert name in error["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/rerank"),
        ("POST", "/v1/audio/transcriptions"),
        ("GET", "/v1/files"),
        ("GET", "/v1/nowhere"),
    ],
)
async def test_what_is_not_served_is_404_in_openais_shape(method: str, path: str) -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.request(method, path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"
