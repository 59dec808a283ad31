"""Log lines: their format, and what they never contain."""

import json
import logging
import re
from collections.abc import Callable, Iterator

import pytest

from api.telemetry import logs
from api.telemetry.logs import (
    configure_logging,
    connected,
    duration,
    plain_level,
)
from engine.core.request import Failed
from tests.api.client import client
from tests.api.scripted import ScriptedEngine

NAMES = ("", "api", "engine", "kernels", "text_generation_router")


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """A function that returns standard output since its last call. Logging is restored after."""
    levels = {name: logging.getLogger(name).level for name in NAMES}
    handlers = list(logging.getLogger().handlers)
    yield lambda: capsys.readouterr().out
    logging.getLogger().handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(False)


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines_have_the_routers_shape(said: Callable[[], str]) -> None:
    configure_logging(json_output=True, level="info", colorize=False)
    logging.getLogger("engine.loading.loader").warning("a line")
    (line,) = lines(said())
    assert list(line) == ["timestamp", "level", "message", "target", "filename", "line_number"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", str(line["timestamp"]))
    assert line["level"] == "WARN"
    assert line["target"] == "skiff::engine::loading::loader"
    assert line["filename"] == "tests/api/telemetry/test_logs.py"


def test_the_ready_line_is_the_one_that_vasts_worker_searches_for(said: Callable[[], str]) -> None:
    configure_logging(json_output=True, level="info", colorize=False)
    connected()
    assert '"message":"Connected","target":"text_generation_router::server"' in said()


def test_text_lines_have_tgis_format(said: Callable[[], str]) -> None:
    configure_logging(json_output=False, level="info", colorize=False)
    connected()
    assert re.fullmatch(
        r"\S+Z  INFO text_generation_router::server: api/telemetry/logs\.py:\d+: Connected\n",
        said(),
    )


def test_colours_can_be_turned_on(said: Callable[[], str]) -> None:
    configure_logging(json_output=False, level="info", colorize=True)
    connected()
    assert "\x1b[32m" in said()


def test_configuring_twice_logs_each_line_once(said: Callable[[], str]) -> None:
    for _ in range(2):
        configure_logging(json_output=True, level="info", colorize=False)
    connected()
    assert len(lines(said())) == 1


def test_a_message_cannot_forge_a_log_line(said: Callable[[], str]) -> None:
    configure_logging(json_output=False, level="info", colorize=False)
    logging.getLogger("api").warning("first\nsecond\x1b[31m")
    text = said()
    assert text.count("\n") == 1
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("debug", logging.DEBUG),
        ("INFO", logging.INFO),
        ("warn", logging.WARNING),
        ("hyper=off,debug", logging.DEBUG),
        ("info,text_generation_router=debug", logging.INFO),
        ("nonsense", logging.INFO),
    ],
)
def test_log_level_is_a_level_or_a_filter_of_rusts_tracing(text: str, level: int) -> None:
    assert plain_level(text) == level


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.23456, "1.23456s"), (0.0123, "12.3ms"), (409.834e-6, "409.834µs"), (53e-9, "53ns")],
)
def test_durations_are_printed_as_rust_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.anyio
async def test_a_successful_request_is_logged_in_one_line_with_its_timings(
    said: Callable[[], str],
) -> None:
    configure_logging(json_output=True, level="info", colorize=False)
    async with client(ScriptedEngine()) as http:
        await http.post("/generate", json={"inputs": "secret words"})
    (line,) = lines(said())
    assert (line["message"], line["target"]) == ("Success", "text_generation_router::server")
    span = line["span"]
    assert isinstance(span, dict)
    assert span["name"] == "generate"
    assert (span["queue_time"], span["inference_time"]) == ("250ms", "500ms")
    assert span["time_per_token"] == "250ms"
    assert span["seed"] == "None"
    assert line["spans"] == [span]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("engine", "body", "text"),
    [
        (ScriptedEngine, {"inputs": ""}, "`inputs` cannot be empty"),
        (lambda: ScriptedEngine(permits=0), {"inputs": "x"}, "Model is overloaded"),
        (
            lambda: ScriptedEngine(lambda _: [[Failed("no luck")]]),
            {"inputs": "x"},
            "Request failed during generation: no luck",
        ),
    ],
)
async def test_a_failed_request_is_logged_in_one_line_with_the_reason(
    said: Callable[[], str], engine: Callable[[], ScriptedEngine], body: object, text: str
) -> None:
    configure_logging(json_output=True, level="info", colorize=False)
    async with client(engine()) as http:
        await http.post("/generate", json=body)
    (line,) = lines(said())
    assert (line["level"], line["message"]) == ("ERROR", text)
    assert line["target"] == "text_generation_router::infer"


@pytest.mark.anyio
async def test_keys_prompts_stop_strings_and_queries_are_never_logged(
    said: Callable[[], str],
) -> None:
    configure_logging(json_output=True, level="debug", colorize=False)
    words = ["hush-key", "hush-prompt", "hush-stop", "hush-query", "hush-header"]
    body = {"inputs": "hush-prompt", "parameters": {"stop": ["hush-stop"]}}
    chat = {"messages": [{"role": "user", "content": "hush-prompt"}]}
    async with client(ScriptedEngine(), api_key="hush-key") as http:
        for key in ("hush-key", "hush-header"):
            headers = {"authorization": f"Bearer {key}"}
            for path, sent in (
                ("/generate", body),
                ("/generate_stream", body),
                ("/v1/chat/completions", chat),
                ("/generate", {"inputs": "hush-prompt", "parameters": {"temperature": -1}}),
                ("/generate", "hush-prompt"),
            ):
                await http.post(path + "?token=hush-query", json=sent, headers=headers)
    text = said()
    assert len(lines(text)) >= 4
    assert not any(word in text for word in words)


def test_log_lines_of_libraries_have_the_same_format(said: Callable[[], str]) -> None:
    configure_logging(json_output=True, level="info", colorize=False)
    library = logging.getLogger("huggingface_hub")
    library.addHandler(logging.StreamHandler())
    library.warning("a download was cut")
    logging.getLogger("httpx").info("GET https://host/?token=secret")
    assert [line["message"] for line in lines(said())] == ["a download was cut"]
    assert logs.SERVER == "text_generation_router.server"
