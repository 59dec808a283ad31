"""A server with an API key and a list of origins. Requests without the key learn nothing (section
1.10), and only pages of the listed origins may read answers (1.11).
"""

from collections.abc import Iterator

import httpx2
import openai
import pytest
import text_generation
from huggingface_hub import InferenceClient

from clients.server import serve
from clients.wire import MESSAGES, PROMPT, VARY

KEY = "Sesame-42"
ORIGIN = "https://ours.example"


@pytest.fixture(scope="module")
def locked() -> Iterator[str]:
    with serve("--api-key", KEY, "--cors-allow-origin", ORIGIN) as running:
        yield running.url


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/generate",
        "/generate_stream",
        "/v1/chat/completions",
        "/v1/completions",
        "/vertex",
        "/invocations",
        "/tokenize",
    ],
)
@pytest.mark.parametrize("key", [None, "Bearer other", KEY, f"Basic {KEY}"])
def test_requests_without_the_key_are_401(locked: str, path: str, key: str | None) -> None:
    """The answer is empty as TGI's, and on OpenAI's routes has OpenAI's shape."""
    headers = {"authorization": key} if key else {}
    for body in ({"inputs": PROMPT}, {"not": "even read"}):
        refused = httpx2.post(f"{locked}{path}", json=body, headers=headers)
        assert refused.status_code == 401
        if path.startswith("/v1/"):
            assert refused.json()["error"]["code"] == "invalid_api_key"
        else:
            assert refused.content == b""


@pytest.mark.parametrize(
    "path", ["/", "/health", "/ping", "/info", "/v1/models", "/metrics", "/api-doc/openapi.json"]
)
def test_routes_that_describe_the_server_are_open(locked: str, path: str) -> None:
    assert httpx2.get(f"{locked}{path}").status_code == 200


def test_chat_tokenize_is_open_as_in_tgi(locked: str) -> None:
    answer = httpx2.post(f"{locked}/chat_tokenize", json={"messages": MESSAGES})
    assert answer.status_code == 200


def test_clients_with_the_key_are_served(locked: str) -> None:
    bearer = {"Authorization": f"Bearer {KEY}"}
    native = text_generation.Client(locked, headers=bearer).generate(PROMPT, max_new_tokens=1)
    assert native.generated_text == " Paris"
    hub = InferenceClient(locked, token=KEY)
    assert hub.text_generation(PROMPT, max_new_tokens=1) == f"{PROMPT} Paris"
    chat = openai.OpenAI(base_url=f"{locked}/v1", api_key=KEY.lower())  # [S] case is ignored
    answer = chat.chat.completions.create(model="tgi", messages=MESSAGES, max_tokens=1)
    assert answer.usage.completion_tokens == 1


def test_a_client_with_another_key_is_refused(locked: str) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{locked}/v1", api_key="other").chat.completions.create(
            model="tgi", messages=MESSAGES
        )


@pytest.mark.parametrize(
    ("origin", "allowed"), [(ORIGIN, ORIGIN), ("https://theirs.example", None), (None, None)]
)
def test_only_pages_of_listed_origins_may_read_an_answer(
    locked: str, origin: str | None, allowed: str | None
) -> None:
    headers = {"origin": origin} if origin else {}
    for path in ("/info", "/nowhere"):
        answer = httpx2.get(f"{locked}{path}", headers=headers)
        assert answer.headers.get("access-control-allow-origin") == allowed
        assert answer.headers["vary"] == VARY
    refused = httpx2.post(f"{locked}/generate", json={"inputs": "x"}, headers=headers)
    assert refused.status_code == 401
    assert refused.headers.get("access-control-allow-origin") == allowed
