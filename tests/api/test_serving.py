"""The process of the server: how it starts, drains and ends, and how it reports failures."""

import re
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from api.process import main
from engine.core.config import DEFAULT_MODEL_ID
from engine.core.errors import DownloadFailed, LoadError
from engine.loading.checkpoint import locate
from tests.thorough import THOROUGH

ROOT = Path(__file__).parents[2]
SERVER = "tests.api.serve_scripted"
ADDRESS = ("--hostname", "127.0.0.1", "--port", "0")


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start servers with the given flags in an environment without settings."""
    started = []

    def start(*flags: str) -> subprocess.Popen[str]:
        first = [flag for flag in flags if flag == "--hurried"]
        flags = flags[len(first) :]
        process = subprocess.Popen(
            [sys.executable, "-m", SERVER, *first, *ADDRESS, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ready_line(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    assert server.stdout.readline() == "one limit: 1\n"
    return server.stdout.readline()


def url_of(server: subprocess.Popen[str]) -> str:
    found = re.search(r"^Ready on .* curl (127\.0\.0\.1:\d+)/generate ", ready_line(server))
    assert found is not None
    return f"http://{found[1]}"


def test_the_server_says_when_it_is_ready_and_drains_on_sigterm(start: Start) -> None:
    server = start()
    url = f"{url_of(server)}/generate_stream"
    with httpx2.stream("POST", url, json={"inputs": "x"}) as answer:
        chunks = answer.iter_bytes()
        received = next(chunks)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx2.ConnectError):  # others are refused meanwhile, as by TGI
            httpx2.post(url, json={"inputs": "x"})
        received += b"".join(chunks)
    assert received.count(b"data: ") == 20
    assert server.wait(5) == 0


@pytest.mark.slow
def test_a_stream_that_does_not_drain_in_time_ends_with_an_error_and_exit_status_0(
    start: Start,
) -> None:
    server = start("--graceful-termination-timeout", "1")
    body = {"inputs": "never ends"}
    with httpx2.stream("POST", f"{url_of(server)}/generate_stream", json=body) as answer:
        chunks = answer.iter_bytes()
        next(chunks)
        asked = time.monotonic()
        server.send_signal(signal.SIGTERM)
        last = b"".join(chunks)
    assert server.wait(5) == 0
    assert time.monotonic() - asked >= 0.4
    assert last.endswith(
        b'data: {"error":"Request failed during generation: the server is shutting down",'
        b'"error_type":"generation"}\n\n'
    )


def test_a_limit_of_the_gpu_s_memory_is_noted_on_a_cpu(start: Start) -> None:
    server = start("--cuda-memory-fraction", "0.5")
    assert server.stdout is not None
    assert "--cuda-memory-fraction (CUDA_MEMORY_FRACTION) changes" in server.stdout.readline()
    url_of(server)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_server_at_once(start: Start, sign: signal.Signals) -> None:
    server = start()
    body = {"inputs": "never ends"}
    with httpx2.stream("POST", f"{url_of(server)}/generate_stream", json=body) as answer:
        chunks = answer.iter_bytes()
        next(chunks)
        server.send_signal(sign)
        time.sleep(0.3)
        assert server.poll() is None
        asked = time.monotonic()
        server.send_signal(sign)
        assert server.wait(5) == 128 + sign
    assert time.monotonic() - asked < 2


@pytest.mark.slow
def test_a_stopped_server_goes_on_where_it_was(start: Start) -> None:
    """A request that arrives meanwhile is as good as any other, however long the stop was."""
    server = start("--hurried")
    url = url_of(server)
    half = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
    half.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
    with httpx2.stream("POST", f"{url}/generate_stream", json={"inputs": "x"}) as answer:
        chunks = answer.iter_bytes()
        received = next(chunks)
        server.send_signal(signal.SIGSTOP)
        time.sleep(30 if THOROUGH > 1 else 3)
        half.sendall(b"\r\n")
        server.send_signal(signal.SIGCONT)
        received += b"".join(chunks)
    assert received.count(b"data: ") == 20
    assert half.recv(100).startswith(b"HTTP/1.1 200 OK")
    half.close()
    assert httpx2.get(f"{url}/health").status_code == 200


@pytest.mark.slow
def test_a_killed_server_starts_again_on_its_port_at_once(start: Start) -> None:
    first = start()
    url = url_of(first)
    with httpx2.Client() as client:
        assert client.get(f"{url}/health").status_code == 200
        with client.stream("POST", f"{url}/generate_stream", json={"inputs": "x"}) as answer:
            chunks = answer.iter_bytes()
            next(chunks)
            first.kill()
            assert first.wait(5) == -signal.SIGKILL
            second = start("--port", url.rpartition(":")[2])
            assert url_of(second) == url
        assert httpx2.post(f"{url}/generate", json={"inputs": "x"}).status_code == 200


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_ends_the_server_while_the_model_loads(start: Start, sign: signal.Signals) -> None:
    server = start("--model-id", "slow")
    assert server.stdout is not None
    assert server.stderr is not None
    assert server.stdout.readline() == "loading\n"
    server.send_signal(sign)
    assert server.wait(5) == 0
    assert server.stderr.read() == ""


@pytest.mark.slow
def test_the_key_and_the_origins_are_those_of_the_flags(start: Start) -> None:
    url = url_of(start("--api-key", "k", "--cors-allow-origin", "https://a"))
    headers = {"origin": "https://a"}
    refused = httpx2.post(f"{url}/generate", content=b"x" * 3_000_000, headers=headers)
    assert (refused.status_code, refused.content) == (401, b"")
    assert refused.headers["access-control-allow-origin"] == "https://a"
    served = httpx2.get(f"{url}/health", headers={"origin": "https://b"})
    assert served.status_code == 200
    assert "access-control-allow-origin" not in served.headers


class FailingEngine:
    error: Exception

    @classmethod
    def load(cls, *_: object) -> None:
        raise cls.error


@pytest.fixture(autouse=True)
def _what_main_changes_is_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HF_API_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def failing_engine(monkeypatch: pytest.MonkeyPatch) -> type[FailingEngine]:
    FailingEngine.error = AssertionError("the model is loaded")
    module = types.ModuleType("engine.engine")
    module.Engine = FailingEngine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "engine.engine", module)
    monkeypatch.setattr("engine.loading.hub.check_model_id", lambda *_: None)
    return FailingEngine


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (LoadError("no such layer; try another"), "ShardCannotStart"),
        (DownloadFailed("no such model; try another"), "DownloadError"),
    ],
)
def test_a_model_that_does_not_load_is_reported_in_our_words_and_tgis(
    error: Exception,
    name: str,
    failing_engine: type[FailingEngine],
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing_engine.error = error
    assert main(["--port", "0"]) == 1
    assert capsys.readouterr().err == f"error: {error}\nError: {name}\n"


@pytest.mark.parametrize(
    "error",
    [TypeError("a\nfault"), KeyError("x"), MemoryError(), AssertionError(), OSError(5, "?")],
)
def test_a_fault_that_nothing_expects_is_one_sentence_with_its_traceback_in_the_log(
    error: Exception,
    failing_engine: type[FailingEngine],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing_engine.error = error
    assert main(["--port", "0", "--model-id", "org/model"]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"error: org/model cannot be served: \w+Error.*report it\)\nError: ShardCannotStart\n", said
    )
    (traced,) = [record for record in caplog.records if record.exc_info]
    assert traced.exc_info is not None
    assert traced.exc_info[1] is error


def test_a_fault_after_the_model_has_loaded_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr("api.process._load", fail)
    assert main(["--port", "0"]) == 1
    assert capsys.readouterr().err == (
        "error: the server cannot run: RuntimeError: no such thing (the log says where; please "
        "report it)\nError: WebserverFailed\n"
    )
    assert any(record.exc_info for record in caplog.records)


def test_the_traceback_of_a_known_error_is_logged_for_debugging_alone(
    failing_engine: type[FailingEngine], caplog: pytest.LogCaptureFixture
) -> None:
    failing_engine.error = LoadError("no such layer; try another")
    for level, num_traced in (("info", 0), ("debug", 1)):
        caplog.clear()
        assert main(["--port", "0", "--log-level", level]) == 1
        assert sum(record.exc_info is not None for record in caplog.records) == num_traced


@pytest.mark.parametrize("name", ["/absolute/missing/path", "./missing", "org/model"])
def test_a_model_that_cannot_be_found_is_reported_before_torch_is_imported(name: str) -> None:
    """The hub is at a port that nobody listens on."""
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "api", "--port", "0", "--model-id", name],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            "PYTHONPATH": str(ROOT),
            "HF_HOME": "/nowhere",
            "HF_ENDPOINT": "http://127.0.0.1:9",
        },
        timeout=120,
        check=False,
    )
    said = ended.stderr.splitlines()
    assert ended.returncode == 1
    (sentence,) = [line for line in said if line.startswith("error: ")]
    assert name in sentence
    assert "Error: DownloadError" in said
    assert not any(line.split("|")[-1].strip() == "torch" for line in said)


@pytest.mark.slow
def test_a_broken_copy_of_the_built_in_model_ends_the_process_in_one_sentence(
    tmp_path: Path,
) -> None:
    """The real process and the real loader; nothing is read beyond the file that is broken."""
    whole = locate(DEFAULT_MODEL_ID).path
    for name in ("cut short", "missing"):
        folder = tmp_path / name
        folder.mkdir()
        for path in whole.iterdir():
            if path.name != "model.safetensors":
                (folder / path.name).symlink_to(path)
    with (whole / "model.safetensors").open("rb") as weights:
        (tmp_path / "cut short" / "model.safetensors").write_bytes(weights.read(1 << 20))
    for name, why in (("cut short", "is cut short"), ("missing", "no weights in")):
        ended = subprocess.run(
            [sys.executable, "-m", "api", "--port", "0", "--model-id", str(tmp_path / name)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            timeout=240,
            check=False,
        )
        assert ended.returncode == 1
        *_, sentence, last = ended.stderr.strip().splitlines()
        assert re.match(rf"error: .*{name} cannot be loaded: .*{why}", sentence)
        assert last == "Error: ShardCannotStart"
        assert "Traceback" not in ended.stderr + ended.stdout


@pytest.mark.usefixtures("failing_engine")
def test_a_taken_port_is_reported_before_the_model_loads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--hostname", "127.0.0.1", "--port", str(port)]) == 1
    assert capsys.readouterr().err == (
        f"error: --port (PORT): {port}: Address already in use\nError: WebserverFailed\n"
    )


@pytest.mark.usefixtures("failing_engine")
def test_a_bad_setting_is_reported_before_the_model_loads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--max-batch-size", "0"]) == 1
    assert capsys.readouterr().err == (
        'Error: ArgumentValidation("--max-batch-size (MAX_BATCH_SIZE): '
        "`max_batch_size` must be > 0, not '0'\")\n"
    )


def test_env_prints_the_installed_versions_and_the_server_starts(
    failing_engine: type[FailingEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    failing_engine.error = LoadError("it went on")
    assert main(["--env", "--port", "0"]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("Runtime environment:\nTarget: ")
    assert "\ntorch version: " in said.out
    assert "\nnvidia-smi:\n   " in said.out
    assert "it went on" in said.err


def test_settings_without_effect_are_reported_at_start(
    failing_engine: type[FailingEngine], caplog: pytest.LogCaptureFixture
) -> None:
    failing_engine.error = LoadError("it went on")
    assert main(["--port", "0", "--speculate", "2", "--prometheus-port", "1"]) == 1
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "--speculate (SPECULATE) changes nothing here: each step makes one token of a sequence; "
        "guesses would change the speed, not the text",
        "--prometheus-port (PROMETHEUS_PORT) changes nothing here: /metrics is served on --port",
    ]
