"""Refusals have the status, the text and the order of TGI's router."""

from typing import Any

import pytest

from engine.core.request import Failed
from tests.api.client import client
from tests.api.scripted import ScriptedEngine, output

pytestmark = pytest.mark.anyio

TWO_WORDS: dict[str, Any] = {"inputs": "two words"}


def asking(**parameters: Any) -> dict[str, Any]:
    return TWO_WORDS | {"parameters": parameters}


VALIDATION_ERRORS = [
    (asking(best_of=2), "you must use sampling when `best_of` is > 1"),
    (asking(best_of=3, do_sample=True), "`best_of` must be > 0 and <= 2. Given: 3"),
    (asking(best_of=2, do_sample=True, seed=1), "`seed` must not be set when `best_of` > 1"),
    (asking(temperature=0), "`temperature` must be strictly positive"),
    (asking(temperature=-1.5), "`temperature` must be strictly positive"),
    (asking(temperature=1e-50), "`temperature` must be strictly positive"),
    (asking(repetition_penalty=0.0), "`repetition_penalty` must be strictly positive"),
    (asking(frequency_penalty=2.1), "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    (asking(frequency_penalty=-2.1), "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    (asking(top_p=0.0), "`top_p` must be > 0.0 and < 1.0"),
    (asking(top_p=1), "`top_p` must be > 0.0 and < 1.0"),
    (asking(top_p=0.99999999999), "`top_p` must be > 0.0 and < 1.0"),
    (asking(typical_p=0.0), "`typical_p` must be > 0.0 and < 1.0"),
    (asking(typical_p=1.0), "`typical_p` must be > 0.0 and < 1.0"),
    (asking(top_k=0), "`top_k` must be strictly positive"),
    (asking(top_k=-1), "`top_k` must be strictly positive"),
    (asking(max_new_tokens=0), "`max_new_tokens` must be strictly positive"),
    (asking(stop=list("abcde")), "`stop` supports up to 4 stop sequences. Given: 5"),
    (asking(stop=[""]), "`stop` sequences cannot be empty"),
    (asking(stop=["a", "", "b"]), "`stop` sequences cannot be empty"),
    (asking(top_n_tokens=6), "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"inputs": ""}, "`inputs` cannot be empty"),
    ({"inputs": "\0"}, "`inputs` cannot be empty"),
    (asking(truncate=0), "`truncate` must be strictly positive and less than 30. Given: 0"),
    (asking(truncate=31), "`truncate` must be strictly positive and less than 30. Given: 31"),
    ({"inputs": "w " * 30}, "`inputs` must have less than 30 tokens. Given: 32"),
    (
        {"inputs": "w " * 2050},
        "`inputs` tokens + `max_new_tokens` must be <= 2048. "
        "Given: 2052 `inputs` tokens and 0 `max_new_tokens`",
    ),
    (
        {"inputs": "w " * 1100, "parameters": {"max_new_tokens": 5000}},
        "`inputs` tokens + `max_new_tokens` must be <= 2048. "
        "Given: 1102 `inputs` tokens and 1024 `max_new_tokens`",
    ),
    (asking(grammar={"type": "regex", "value": {}}), "grammar is not supported"),
    (asking(grammar={"type": "json", "value": 3}), "grammar is not supported"),
    (asking(grammar={"type": "json", "value": []}), "grammar is not supported"),
    (
        asking(grammar={"type": "json", "value": {"type": "object"}}),
        "grammar is not valid: Grammar must have a 'properties' field",
    ),
    (
        asking(grammar={"type": "json_object", "value": "{}"}),
        "grammar is not valid: Grammar must have a 'properties' field",
    ),
    (
        asking(grammar={"type": "json_schema", "value": {"schema": {}}}),
        "grammar is not valid: Grammar must have a 'properties' field",
    ),
    (
        asking(grammar={"type": "json_schema", "value": {"properties": {}}}),
        "grammar is not valid: missing field `schema`",
    ),
    (asking(grammar={"type": "regex", "value": "[a-z"}), "grammar is not valid: not a regex"),
]


@pytest.mark.parametrize(("body", "text"), VALIDATION_ERRORS)
async def test_a_validation_error_has_tgis_text(body: object, text: str) -> None:
    engine = ScriptedEngine()
    async with client(engine, max_input_tokens=30) as http:
        answer = await http.post("/generate", json=body)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/json"
    assert answer.text == (
        f'{{"error":"Input validation error: {text}","error_type":"validation"}}'
    )
    assert not engine.requests


FAULTS_IN_ORDER: list[tuple[str, object, str]] = [
    ("temperature", 0, "`temperature` must be"),
    ("repetition_penalty", 0, "`repetition_penalty` must be"),
    ("frequency_penalty", 3, "`frequency_penalty` must be"),
    ("top_p", 0, "`top_p` must be"),
    ("typical_p", 0, "`typical_p` must be"),
    ("top_k", 0, "`top_k` must be"),
    ("max_new_tokens", 0, "`max_new_tokens` must be"),
    ("stop", [""] * 5, "`stop` supports"),
    ("seed", 1, "`seed` must not be set"),
    ("top_n_tokens", 9, "`top_n_tokens` must be"),
    ("truncate", 0, "`truncate` must be"),
    ("grammar", {"type": "json", "value": {}}, "grammar is not"),
]


@pytest.mark.parametrize("first", range(len(FAULTS_IN_ORDER)))
async def test_the_first_fault_in_tgis_order_is_reported(first: int) -> None:
    faults = FAULTS_IN_ORDER[first:]
    parameters = {name: value for name, value, _ in faults} | {"best_of": 2, "do_sample": True}
    async with client(ScriptedEngine()) as http:
        answer = await http.post("/generate", json={"inputs": "x", "parameters": parameters})
    assert answer.json()["error"].startswith("Input validation error: " + faults[0][2])


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", asking(stop=[""])),
        ("/generate_stream", asking(stop=["a", ""])),
        ("/", asking(stop=[""])),
        ("/", asking(stop=[""]) | {"stream": True}),
        ("/invocations", asking(stop=[""])),
        ("/v1/chat/completions", CHAT | {"stop": ""}),
        ("/v1/chat/completions", CHAT | {"stop": ["", "a"], "stream": True}),
        ("/v1/completions", {"prompt": "x", "stop": ""}),
        ("/v1/completions", {"prompt": ["x", "y"], "stop": ["a", ""], "stream": True}),
    ],
)
async def test_an_empty_stop_string_is_refused_on_every_route(path: str, body: object) -> None:
    engine = ScriptedEngine()
    async with client(engine) as http:
        answer = await http.post(path, json=body)
    assert "`stop` sequences cannot be empty" in answer.text
    assert not engine.requests


async def test_best_of_is_not_allowed_if_the_limit_is_one() -> None:
    async with client(ScriptedEngine(), max_best_of=1) as http:
        answer = await http.post("/generate", json=asking(best_of=2, do_sample=True))
    assert answer.json()["error"] == (
        "Input validation error: `best_of` != 1 is not allowed for this endpoint"
    )


async def test_a_tokenizer_that_fails_is_a_validation_error() -> None:
    engine = ScriptedEngine()
    engine.tokenizer.error = ValueError("bad bytes")
    async with client(engine) as http:
        answer = await http.post("/generate", json=TWO_WORDS)
    assert answer.status_code == 422
    assert answer.json()["error"] == "Input validation error: tokenizer error bad bytes"


async def test_a_prompt_is_truncated_before_its_length_is_checked() -> None:
    async with client(ScriptedEngine(), max_input_tokens=30) as http:
        body = {"inputs": "w " * 100, "parameters": {"truncate": 30}}
        answer = await http.post("/generate", json=body)
    assert answer.headers["x-prompt-tokens"] == "30"


async def test_overload_is_reported_before_faults_of_the_request() -> None:
    async with client(ScriptedEngine(permits=0)) as http:
        answer = await http.post("/generate", json={"inputs": ""})
    assert answer.status_code == 429
    assert answer.content == b'{"error":"Model is overloaded","error_type":"overloaded"}'


async def test_the_limit_of_best_of_is_checked_before_overload() -> None:
    async with client(ScriptedEngine(permits=0)) as http:
        answer = await http.post("/generate", json=asking(best_of=3))
    assert answer.status_code == 422


async def test_a_failed_generation_is_424() -> None:
    async with client(ScriptedEngine(lambda _: [[output("a"), Failed("out of luck")]])) as http:
        answer = await http.post("/generate", json=TWO_WORDS)
    assert answer.status_code == 424
    assert answer.content == (
        b'{"error":"Request failed during generation: out of luck","error_type":"generation"}'
    )


async def test_a_dead_engine_is_424() -> None:
    engine = ScriptedEngine()
    engine.state, engine.reason = "dead", "the device is gone"
    async with client(engine) as http:
        answer = await http.post("/generate", json=TWO_WORDS)
    assert answer.status_code == 424
    assert answer.json()["error"].endswith(": the device is gone")


async def test_a_generation_without_its_end_is_500() -> None:
    async with client(ScriptedEngine(lambda _: [[output("a")]])) as http:
        answer = await http.post("/generate", json=TWO_WORDS)
    assert answer.status_code == 500
    assert answer.content == (
        b'{"error":"Incomplete generation","error_type":"incomplete_generation"}'
    )


SHAPE = "Failed to deserialize the JSON body into the target type: "
SYNTAX = "Failed to parse the request body as JSON: "

REJECTED_BODIES = [
    (b"", 400, SYNTAX + "EOF while parsing a value at line 1 column 0"),
    (b'{"inputs":', 400, SYNTAX + "EOF while parsing a value at line 1 column 10"),
    (b'{"inputs":NaN}', 400, SYNTAX + "expected value at line 1 column 11"),
    (b"{}", 422, SHAPE + "missing field `inputs` at line 1 column 2"),
    (b'{\n"a":1}', 422, SHAPE + "missing field `inputs` at line 2 column 6"),
    (b"[]", 422, SHAPE + "invalid type: sequence, expected struct GenerateRequest"),
    (b'"x"', 422, SHAPE + 'invalid type: string "x", expected struct GenerateRequest'),
    (b'{"inputs":null}', 422, SHAPE + "inputs: invalid type: null, expected a string"),
    (b'{"inputs":["a"]}', 422, SHAPE + "inputs: invalid type: sequence, expected a string"),
    (
        b'{"inputs":"a","parameters":null}',
        422,
        SHAPE + "parameters: invalid type: null, expected struct GenerateParameters",
    ),
]

REJECTED_PARAMETERS = [
    (b'"temperature":"a"', 'temperature: invalid type: string "a", expected f32'),
    (b'"temperature":true', "temperature: invalid type: boolean `true`, expected f32"),
    (b'"top_k":2147483648', "top_k: invalid value: integer `2147483648`, expected i32"),
    (b'"top_k":20.0', "top_k: invalid type: floating point `20.0`, expected i32"),
    (b'"max_new_tokens":-1', "max_new_tokens: invalid value: integer `-1`, expected u32"),
    (b'"max_new_tokens":true', "max_new_tokens: invalid type: boolean `true`, expected u32"),
    (b'"max_new_tokens":{}', "max_new_tokens: invalid type: map, expected u32"),
    (b'"seed":-1', "seed: invalid value: integer `-1`, expected u64"),
    (b'"best_of":"2"', 'best_of: invalid type: string "2", expected usize'),
    (b'"truncate":1.5', "truncate: invalid type: floating point `1.5`, expected usize"),
    (b'"top_n_tokens":[]', "top_n_tokens: invalid type: sequence, expected u32"),
    (b'"do_sample":null', "do_sample: invalid type: null, expected a boolean"),
    (b'"watermark":1', "watermark: invalid type: integer `1`, expected a boolean"),
    (b'"details":null', "details: invalid type: null, expected a boolean"),
    (
        b'"decoder_input_details":null',
        "decoder_input_details: invalid type: null, expected a boolean",
    ),
    (b'"stop":null', "stop: invalid type: null, expected a sequence"),
    (b'"stop":"a"', 'stop: invalid type: string "a", expected a sequence'),
    (b'"stop":["a",1]', "stop[1]: invalid type: integer `1`, expected a string"),
    (b'"adapter_id":1', "adapter_id: invalid type: integer `1`, expected a string"),
    (b'"grammar":{"type":"json"}', "grammar: missing field `value`"),
    (
        b'"grammar":{"type":"text","value":1}',
        "grammar: unknown variant `text`, expected one of `json`, `json_object`, `regex`, "
        "`json_schema`",
    ),
]


@pytest.mark.parametrize(("raw", "status", "text"), REJECTED_BODIES)
async def test_a_body_that_is_no_request_is_rejected_in_text(
    raw: bytes, status: int, text: str
) -> None:
    answer = await _post_raw(raw)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text.startswith(text)


@pytest.mark.parametrize(("parameter", "text"), REJECTED_PARAMETERS)
async def test_a_parameter_of_the_wrong_type_is_named_in_text(parameter: bytes, text: str) -> None:
    raw = b'{"inputs":"a","parameters":{' + parameter + b"}}"
    answer = await _post_raw(raw)
    assert answer.status_code == 422
    assert answer.text == f"{SHAPE}parameters.{text} at line 1 column {len(raw)}"


async def test_bytes_after_the_first_json_value_are_ignored() -> None:
    answer = await _post_raw(b' {"inputs":"a"} trailing \xff')
    assert answer.status_code == 200


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/x+json"])
async def test_json_content_types_are_accepted(kind: str) -> None:
    assert (await _post_raw(b'{"inputs":"a"}', kind)).status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "text/json", "application/xml"])
async def test_other_content_types_are_415(kind: str | None) -> None:
    answer = await _post_raw(b"{}", kind)
    assert answer.status_code == 415
    assert answer.text == "Expected request with `Content-Type: application/json`"


async def test_a_body_over_the_limit_is_413() -> None:
    answer = await _post_raw(b'{"inputs":"' + b"x" * 2_000_000)
    assert answer.status_code == 413
    assert answer.text == "Failed to buffer the request body: length limit exceeded"


@pytest.mark.parametrize("path", ["/generate_stream", "/"])
async def test_bodies_are_rejected_before_a_stream_begins(path: str) -> None:
    answer = await _post_raw(b"{}", path=path)
    assert answer.status_code == 422


async def test_an_unknown_path_is_404_without_a_body() -> None:
    async with client(ScriptedEngine()) as http:
        for path in ("/nothing", "/generate/"):
            answer = await http.post(path, json={})
            assert (answer.status_code, answer.content) == (404, b"")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/generate", "POST"),
        ("PUT", "/", "GET,HEAD,POST"),
        ("POST", "/health", "GET,HEAD"),
        ("DELETE", "/info", "GET,HEAD"),
    ],
)
async def test_a_wrong_method_is_405_without_a_body(method: str, path: str, allow: str) -> None:
    async with client(ScriptedEngine()) as http:
        answer = await http.request(method, path)
    assert (answer.status_code, answer.content) == (405, b"")
    assert answer.headers["allow"] == allow


async def _post_raw(
    raw: bytes, kind: str | None = "application/json", path: str = "/generate"
) -> Any:
    headers = {} if kind is None else {"content-type": kind}
    async with client(ScriptedEngine()) as http:
        return await http.post(path, content=raw, headers=headers)
