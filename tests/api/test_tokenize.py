"""/tokenize and /chat_tokenize, whose spans count bytes of the text and not characters."""

import pytest

from engine.core.errors import TemplateError
from tests.api.client import client
from tests.api.scripted import ScriptedEngine

pytestmark = pytest.mark.anyio

CHAT = {"messages": [{"role": "user", "content": "é"}]}


async def test_tokens_have_the_bytes_that_they_stand_for() -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.post("/tokenize", json={"inputs": "aé🙂"})
    assert answer.status_code == 200
    assert answer.content.decode() == (
        '[{"id":1,"text":"","start":0,"stop":0},{"id":3,"text":"aé","start":0,"stop":3},'
        '{"id":3,"text":"�","start":3,"stop":6},{"id":1,"text":"�","start":6,"stop":7}]'
    )
    assert not [name for name in answer.headers if name.startswith("x-")]


async def test_an_empty_text_and_bad_parameters_are_accepted() -> None:
    body = {"inputs": "", "parameters": {"truncate": 0, "max_new_tokens": 0}}
    async with client(ScriptedEngine(permits=0)) as http:
        answer = await http.post("/tokenize", json=body)
    assert answer.json() == [{"id": 1, "text": "", "start": 0, "stop": 0}]


async def test_a_chat_is_tokenized_as_its_prompt_without_special_tokens() -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.post("/chat_tokenize", json=CHAT)
    assert answer.content.decode() == (
        '{"tokenize_response":[{"id":3,"text":"use","start":0,"stop":3},'
        '{"id":3,"text":"r: ","start":3,"stop":6},{"id":2,"text":"é","start":6,"stop":8}],'
        '"templated_text":"user: é"}'
    )


async def test_tools_are_in_the_prompt() -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    async with client(ScriptedEngine()) as http:
        answer = await http.post("/chat_tokenize", json=CHAT | {"tools": tools})
    assert '"name":"clock"' in answer.json()["templated_text"]


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {"inputs": "x"}), ("/chat_tokenize", CHAT)]
)
async def test_a_tokenizer_that_fails_is_a_validation_error(path: str, body: object) -> None:
    engine = ScriptedEngine()
    engine.tokenizer.error = ValueError("bad bytes")
    async with client(engine) as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 422
    assert answer.content == (
        b'{"error":"Input validation error: tokenizer error bad bytes","error_type":"validation"}'
    )


async def test_a_template_that_fails_is_a_template_error() -> None:
    engine = ScriptedEngine()
    engine.tokenizer.template_error = TemplateError("template not found")
    async with client(engine) as http:
        answer = await http.post("/chat_tokenize", json=CHAT)
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "template_error"


async def test_bodies_of_another_shape_are_rejected() -> None:
    shape = "Failed to deserialize the JSON body into the target type: "
    async with client(ScriptedEngine()) as http:
        for path, field in (("/tokenize", "inputs"), ("/chat_tokenize", "messages")):
            answer = await http.post(path, json={})
            assert answer.text == f"{shape}missing field `{field}` at line 1 column 2"
