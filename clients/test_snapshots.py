"""Complete answers of every route, compared with the files in snapshots/. Keys and their order,
texts, ids, headers, statuses and errors must be equal; logprobs have a tolerance, and of times only
the format is checked.

    .venv-clients/bin/python -m pytest clients/test_snapshots.py --regenerate

rewrites the files. Review the difference like code, against the contract, before committing it.
Files of errors that the contract spells out were written from the contract, before their routes.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from clients.comparing import differences
from clients.wire import CHAT_PROMPT, CITY, MESSAGES, PROMPT, TOOL, events, every_permit_taken

FOLDER = Path(__file__).parent / "snapshots"
TIMES = {
    "x-compute-time": r"\d+\.\d+",
    **dict.fromkeys(
        (
            "x-total-time",
            "x-validation-time",
            "x-queue-time",
            "x-inference-time",
            "x-time-per-token",
        ),
        r"\d+",
    ),
}
KEPT = re.compile(r"x-.*|content-type|cache-control|allow|www-authenticate")


@dataclass
class Case:
    """A request whose answer is in the file `name`."""

    name: str
    path: str
    json: Any = None
    method: str = "POST"
    text: str | None = None
    content_type: str | None = "application/json"
    full: bool = False  # send it while every permit is taken

    def send(self, client: httpx2.Client) -> httpx2.Response:
        body = self.text if self.json is None else json.dumps(self.json, ensure_ascii=False)
        headers = {"content-type": self.content_type} if self.content_type else {}
        return client.request(
            self.method, self.path, headers=headers, content=None if body is None else body.encode()
        )

    def described(self) -> dict[str, Any]:
        """Return the request for the snapshot file. A large body is replaced by its size."""
        body = self.json
        if self.text is not None:
            body = self.text if len(self.text) < 1000 else f"<{len(self.text)} characters>"
        request = {"method": self.method, "path": self.path, "body": body}
        return request if self.content_type == "application/json" else request | {"type": None}


def generate(name: str, path: str, inputs: str = PROMPT, **parameters: Any) -> Case:
    stream = {"stream": parameters.pop("stream")} if "stream" in parameters else {}
    return Case(name, path, {"inputs": inputs, "parameters": parameters} | stream)


def chat(name: str, path: str = "/v1/chat/completions", **asked: Any) -> Case:
    greedy = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0.0}
    return Case(name, path, {k: v for k, v in (greedy | asked).items() if v is not ...})


def completion(name: str, path: str = "/v1/completions", **asked: Any) -> Case:
    return Case(name, path, {"prompt": PROMPT, "max_tokens": 3, "temperature": 0.0} | asked)


SAMPLED: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1.2,
    "top_k": 40,
    "top_p": 0.9,
    "seed": 42,
}
ODD = "Bonjour 🌍, 你好 e\u0301!"
TOOLS: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60}
USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}
LOGPROBS: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
BY_FORMAT: dict[str, Any] = {
    "response_format": {"type": "json_object", "value": CITY},
    "max_tokens": 40,
}
NO_OBJECT = {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}
CITY_JSON = {"type": "json", "value": CITY}
NOT_A_SCHEMA = {"type": "json", "value": "{"}
NO_PROPERTIES = {"type": "json", "value": {"type": "object"}}

CASES = [
    Case("info", "/info", method="GET"),
    Case("health", "/health", method="GET"),
    Case("health_at_root", "/", method="GET"),
    Case("ping", "/ping", method="GET"),
    Case("models", "/v1/models", method="GET"),
    generate("generate", "/generate", max_new_tokens=4),
    generate("generate_details", "/generate", max_new_tokens=3, details=True),
    generate(
        "generate_all_details",
        "/generate",
        max_new_tokens=3,
        details=True,
        decoder_input_details=True,
        top_n_tokens=2,
        return_full_text=True,
    ),
    generate("generate_prefill_alone", "/generate", max_new_tokens=1, decoder_input_details=True),
    generate(
        "generate_sampled", "/generate", max_new_tokens=4, details=True, top_n_tokens=3, **SAMPLED
    ),
    generate(
        "generate_penalties",
        "/generate",
        max_new_tokens=4,
        details=True,
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        watermark=True,
    ),
    generate("generate_eos", "/generate", CHAT_PROMPT, max_new_tokens=60, details=True),
    generate("generate_stop", "/generate", max_new_tokens=9, details=True, stop=["."]),
    generate(
        "generate_truncated",
        "/generate",
        max_new_tokens=2,
        truncate=3,
        details=True,
        decoder_input_details=True,
    ),
    generate("generate_json", "/generate", max_new_tokens=40, details=True, grammar=CITY_JSON),
    generate("generate_odd_text", "/generate", ODD, max_new_tokens=4, details=True),
    generate("compat", "/", max_new_tokens=2, details=True),
    generate("compat_without_full_text", "/", max_new_tokens=2, return_full_text=False),
    generate("compat_stream", "/", max_new_tokens=2, details=True, stream=True),
    generate("stream", "/generate_stream", max_new_tokens=3),
    generate(
        "stream_details",
        "/generate_stream",
        max_new_tokens=3,
        details=True,
        top_n_tokens=2,
        **SAMPLED,
    ),
    generate("stream_eos", "/generate_stream", CHAT_PROMPT, max_new_tokens=60, details=True),
    generate("tokenize", "/tokenize"),
    generate("tokenize_odd_text", "/tokenize", ODD),
    chat("chat_tokenize", "/chat_tokenize"),
    chat("chat"),
    chat("chat_logprobs", **LOGPROBS),
    chat("chat_string_stop", stop="x"),
    chat("chat_text_format", response_format={"type": "text"}),
    chat("chat_both_limits", max_completion_tokens=4),
    chat("chat_sampled", temperature=1.2, top_p=0.9, seed=42, model="mine"),
    chat("chat_ended", messages=[{"role": "user", "content": "Say OK."}], max_tokens=60),
    chat("chat_stop", max_tokens=20, stop=["a"]),
    chat("chat_continued", messages=[*MESSAGES, {"role": "assistant", "content": "It is"}]),
    chat("chat_tool", **TOOLS),
    chat("chat_format", **BY_FORMAT),
    chat("chat_stream", stream=True),
    chat("chat_stream_logprobs", stream=True, max_tokens=2, **LOGPROBS, **USAGE),
    chat("chat_stream_tool", stream=True, **TOOLS),
    chat("chat_tool_cut_short", **TOOLS | {"max_tokens": 12}),
    chat("chat_stream_tool_cut_short", stream=True, **TOOLS | {"max_tokens": 12}),
    chat("chat_tool_and_format", tools=[TOOL], **BY_FORMAT),
    chat("chat_choices", n=2, seed=7, temperature=1.5),
    completion("completion"),
    completion("completion_sampled", temperature=1.2, top_p=0.9, seed=42, model="mine"),
    completion("completion_stream", stream=True),
    completion("completion_stream_eos", prompt=CHAT_PROMPT, max_tokens=60, stream=True),
    completion("completion_choices", prompt=[PROMPT, "One, two,"], n=2, seed=7, temperature=1.5),
    completion("completion_echo", echo=True, logprobs=2),
    completion("completion_stop", stop="is the", max_tokens=20, stream=True),
    completion("completion_stream_logprobs", stream=True, logprobs=1, **USAGE),
    generate("invocations_generate", "/invocations", max_new_tokens=2),
    chat("invocations_chat", "/invocations"),
    completion("invocations_completion", "/invocations"),
    Case(
        "vertex",
        "/vertex",
        {"instances": [{"inputs": PROMPT, "parameters": {"max_new_tokens": 4, "seed": 42}}]},
    ),
    # refused by validation
    generate("refused_temperature", "/generate", temperature=0.0),
    generate("refused_empty", "/generate", ""),
    generate("refused_length", "/generate", max_new_tokens=600),
    generate("refused_best_of", "/generate", best_of=2),
    generate("refused_schema", "/generate", grammar=NOT_A_SCHEMA),
    generate("refused_schema_without_properties", "/generate", grammar=NO_PROPERTIES),
    generate("refused_compat", "/", top_p=1.0),
    generate("refused_stream", "/generate_stream", best_of=2, do_sample=True),
    generate("refused_stream_prefill", "/generate_stream", decoder_input_details=True),
    generate("refused_full", "/generate", full=...),
    generate("refused_stream_full", "/generate_stream", full=...),
    chat("refused_chat", top_p=1.5),
    chat("refused_chat_stream", top_p=1.5, stream=True),
    chat("refused_chat_full"),
    chat("refused_chat_stream_full", stream=True),
    chat("refused_tool_name", tools=[TOOL], tool_choice="get_news"),
    chat("refused_tool_schema", tools=[NO_OBJECT]),
    chat("refused_functions", functions=[NO_OBJECT["function"]]),
    completion("refused_suffix", suffix="!"),
    completion("refused_token_id", prompt=[49152]),
    completion("refused_prompts", prompt=["x"] * 5),
    completion("refused_completion_stream", stream=True, top_p=1.5),
    Case("refused_vertex_empty", "/vertex", {"instances": []}),
    Case("refused_vertex_instance", "/vertex", {"instances": [{"inputs": ""}]}),
    # not read at all: 5.3
    Case("unread_no_type", "/generate", {"inputs": "x"}, content_type=None),
    Case("unread_wrong_type", "/generate", {"inputs": "x"}, content_type="text/plain"),
    Case("unread_empty", "/generate", text=""),
    Case("unread_not_json", "/generate", text="inputs"),
    Case("unread_cut_short", "/generate", text='{"inputs": "x"'),
    Case("unread_no_inputs", "/generate", {}),
    Case("unread_list", "/generate", {"inputs": ["x"]}),
    Case("unread_null_parameters", "/generate", {"inputs": "x", "parameters": None}),
    generate("unread_parameter", "/generate", temperature="a"),
    generate("unread_negative", "/generate", max_new_tokens=-1),
    generate("unread_float", "/generate", top_k=20.0),
    generate("unread_null_stop", "/generate_stream", stop=None),
    Case("unread_too_large", "/generate", text=json.dumps({"inputs": "x" * 2_000_000})),
    Case("unread_tokenize", "/tokenize", {}),
    chat("unread_no_messages", messages=...),
    chat("unread_message", messages=[{"role": "user"}]),
    completion("unread_no_prompts", prompt=[]),
    Case("unread_openai_not_json", "/v1/completions", text="{"),
    Case("unread_openai_wrong_type", "/v1/completions", {"prompt": "x"}, content_type=None),
    Case("unread_invocations", "/invocations", {"text": "x"}),
    # the rest of HTTP
    Case("no_such_route", "/generates", method="GET"),
    Case("no_such_openai_route", "/v1/embeddings", {"input": "x"}),
    Case("no_such_openai_method", "/v1/completions", method="GET"),
    Case("no_such_method", "/generate", method="GET"),
]
for case in CASES:
    case.full = case.name.endswith("_full")
    if isinstance(case.json, dict) and isinstance(case.json.get("parameters"), dict):
        case.json["parameters"].pop("full", None)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url, timeout=120) as client:
        yield client


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_answer_equals_its_snapshot(
    case: Case, client: httpx2.Client, url: str, pytestconfig: pytest.Config
) -> None:
    if case.full:
        with every_permit_taken(url):
            response = case.send(client)
    else:
        response = case.send(client)
    answer = recorded(response)
    file = FOLDER / f"{case.name}.json"
    if pytestconfig.getoption("regenerate"):
        entry = {"request": case.described(), "response": answer}
        file.write_text(json.dumps(entry, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert file.exists(), f"not on file; got {json.dumps(answer, ensure_ascii=False)}"
    entry = json.loads(file.read_text(encoding="utf-8"))
    assert entry["request"] == case.described(), "the file is of another request"
    assert list(differences(entry["response"], answer)) == []


def test_every_snapshot_belongs_to_a_case() -> None:
    assert {file.stem for file in FOLDER.iterdir()} <= {case.name for case in CASES}


def recorded(response: httpx2.Response) -> dict[str, Any]:
    """Return the parts of an answer that are the same each time."""
    headers = {name: response.headers[name] for name in sorted(set(response.headers))}
    kept = {name: _timeless(name, value) for name, value in headers.items() if KEPT.fullmatch(name)}
    answer: dict[str, Any] = {"status": response.status_code, "headers": kept}
    kind = response.headers.get("content-type", "")
    if kind == "application/json":
        assert_compact(response.text)
        return answer | {"json": _dateless(json.loads(_anonymous(response.text)))}
    if kind == "text/event-stream":
        told = events(_anonymous(response.text))
        return answer | {"events": [_dateless(event) for event in told]}
    return answer | {"text": response.text}


def _timeless(name: str, value: str) -> str:
    pattern = TIMES.get(name)
    if pattern is None:
        return value
    assert re.fullmatch(pattern, value), (name, value)
    return "<seconds>" if name == "x-compute-time" else "<milliseconds>"


def _anonymous(text: str) -> str:
    """Return the JSON of an answer without the ids of it and its calls, which are unique."""
    return re.sub(r'"id":"(chatcmpl-|cmpl-|call_)[0-9a-f]{24,32}"', r'"id":"\1<id>"', text)


def _dateless(value: Any) -> Any:
    """Return the JSON of an answer without its date."""
    if isinstance(value, dict) and "created" in value and value.get("object") != "list":
        assert value["created"] > 1_700_000_000
        return value | {"created": "<now>"}
    return value


def assert_compact(text: str) -> None:
    """Check serde's format: no spaces, and no unnecessary escapes."""
    again = json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
    assert again == text or "e-" in again  # small numbers are spelled in more ways than one
