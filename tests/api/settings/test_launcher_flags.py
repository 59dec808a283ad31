"""A command line or an environment made for TGI's launcher starts Skiff, or the error says why."""

import os
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest

from api.settings.config import ConfigError, Settings, read_settings
from api.settings.launcher_flags import CheckpointFormat, LauncherFlags
from api.settings.vast_variables import VastVariables
from engine.core.config import Quantization

ROOT = Path(__file__).parents[3]
LAUNCHER = ROOT / "text-generation-launcher"
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

VALUES: list[tuple[str, str, Any]] = [
    ("model-id", "bigscience/bloom-560m", "bigscience/bloom-560m"),
    ("revision", "refs/pr/1", "refs/pr/1"),
    ("validation-workers", "3", 3),
    ("sharded", "false", "false"),
    ("num-shard", "1", 1),
    ("quantize", "bitsandbytes-nf4", "bitsandbytes-nf4"),
    ("speculate", "2", 2),
    ("dtype", "float16", "float16"),
    ("kv-cache-dtype", "fp8_e4m3fn", "fp8_e4m3fn"),
    ("max-concurrent-requests", "256", 256),
    ("max-best-of", "3", 3),
    ("max-stop-sequences", "6", 6),
    ("max-top-n-tokens", "7", 7),
    ("max-input-tokens", "100", 100),
    ("max-input-length", "100", 100),
    ("max-total-tokens", "2048", 2048),
    ("waiting-served-ratio", "1.2", 1.2),
    ("max-batch-prefill-tokens", "4096", 4096),
    ("max-batch-total-tokens", "16000", 16000),
    ("max-waiting-tokens", "10", 10),
    ("max-batch-size", "8", 8),
    ("cuda-graphs", "1,2,4", [1, 2, 4]),
    ("hostname", "127.0.0.1", "127.0.0.1"),
    ("port", "5001", 5001),
    ("prometheus-port", "9001", 9001),
    ("shard-uds-path", "/tmp/x", "/tmp/x"),
    ("master-addr", "host", "host"),
    ("master-port", "29501", 29501),
    ("huggingface-hub-cache", "/data", "/data"),
    ("weights-cache-override", "/weights", "/weights"),
    ("cuda-memory-fraction", "0.8", 0.8),
    ("cpu-cache-gib", "0.5", 0.5),
    ("rope-scaling", "dynamic", "dynamic"),
    ("rope-factor", "2.5", 2.5),
    ("otlp-endpoint", "http://collector:4317", "http://collector:4317"),
    ("otlp-service-name", "mine", "mine"),
    ("cors-allow-origin", "https://a.example", ["https://a.example"]),
    ("watermark-gamma", "0.25", 0.25),
    ("watermark-delta", "1.5", 1.5),
    ("ngrok-edge", "e", "e"),
    ("tokenizer-config-path", "/t.json", "/t.json"),
    ("max-client-batch-size", "16", 16),
    ("usage-stats", "no-stack", "no-stack"),
    ("payload-limit", "1000", 1000),
    ("graceful-termination-timeout", "10", 10),
    ("max-image-fetch-size", "5", 5),
]
SWITCHES = [
    "batch-invariant",
    "api-key-for-chat-tokenize",
    "trust-remote-code",
    "disable-custom-kernels",
    "json-output",
    "ngrok",
    "disable-grammar-support",
    "enable-prefill-logprobs",
]
SECRETS = ["api-key", "ngrok-authtoken"]
ONLY_IN_THE_ENVIRONMENT = [
    ("LOG_LEVEL", "debug", "debug"),
    ("COMPUTE_TYPE", "gpu", "gpu"),
    ("ATTENTION", "flashinfer", "flashinfer"),
    ("PREFIX_CACHING", "0", False),
    ("PREFIX_CACHING", "true", True),
    ("SUPERVISE", "false", False),
    ("PREFILL_CHUNKING", "0", False),
    ("TGI_WIGGLE_ROOM", "0.95", 0.95),
    ("USE_FLASH_ATTENTION", "true", True),
    ("REQUEST_LOGPROBS", "1", True),
    ("CUDA_GRAPHS", "0", [0]),
    ("DISABLE_EXLLAMA", "1", True),
    ("USE_CUTLASS_W8A8", "true", True),
]


def field_of(flag: str) -> str:
    return flag.replace("-", "_")


@pytest.mark.parametrize(("flag", "text", "value"), VALUES)
def test_every_flag_is_read_from_the_command_line(flag: str, text: str, value: Any) -> None:
    assert getattr(read_settings([f"--{flag}", text]), field_of(flag)) == value


@pytest.mark.parametrize(("flag", "text", "value"), VALUES)
def test_every_flag_is_read_from_the_environment(
    flag: str, text: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(field_of(flag).upper(), text)
    assert getattr(read_settings([]), field_of(flag)) == value


@pytest.mark.parametrize("flag", SWITCHES)
def test_a_switch_needs_no_value_and_its_variable_is_true(
    flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = field_of(flag)
    assert getattr(read_settings([]), field) is False
    assert getattr(read_settings([f"--{flag}"]), field) is True
    monkeypatch.setenv(field.upper(), "true")
    assert getattr(read_settings([]), field) is True


@pytest.mark.parametrize("flag", SECRETS)
def test_a_secret_is_accepted_and_never_shown(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    field = field_of(flag)
    monkeypatch.setenv(field.upper(), "Sesame")
    settings = read_settings([])
    assert getattr(settings, field).get_secret_value() == "Sesame"
    assert "Sesame" not in repr(settings) + "".join(settings.notes())


@pytest.mark.parametrize(("variable", "text", "value"), ONLY_IN_THE_ENVIRONMENT)
def test_variables_that_are_no_flags_in_tgi_are_read(
    variable: str, text: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    assert getattr(read_settings([]), variable.lower()) == value


DEFAULTS: dict[str, Any] = {
    "validation_workers": 2,
    "quantize": None,
    "dtype": None,
    "max_concurrent_requests": 128,
    "max_best_of": 2,
    "max_stop_sequences": 4,
    "max_top_n_tokens": 5,
    "max_input_tokens": None,
    "max_total_tokens": None,
    "waiting_served_ratio": 0.3,
    "max_waiting_tokens": 20,
    "hostname": "0.0.0.0",
    "port": 3000,
    "prometheus_port": 9000,
    "cuda_memory_fraction": 1.0,
    "otlp_endpoint": None,
    "otlp_service_name": "text-generation-inference.router",
    "cors_allow_origin": [],
    "api_key": None,
    "watermark_gamma": 0.5,
    "watermark_delta": 2.0,
    "max_client_batch_size": 4,
    "payload_limit": 2_000_000,
    "max_image_fetch_size": 1_073_741_824,
    "graceful_termination_timeout": 90,
    "log_level": "info",
    "log_colorize": True,
    "env": False,
}


def test_defaults_are_tgis() -> None:
    settings = read_settings([])
    assert {name: getattr(settings, name) for name in DEFAULTS} == DEFAULTS
    assert list(settings.notes()) == []


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["--speculate", "3"],
            "--speculate (SPECULATE) changes nothing here: each step makes one token",
        ),
        (["--ngrok"], "--ngrok (NGROK) changes nothing here: there is no tunnel"),
        (
            ["--cuda-graphs", "1,2"],
            "--cuda-graphs (CUDA_GRAPHS): graphs are enabled, but the sizes",
        ),
        (["--quantize", "gptq"], "--quantize (QUANTIZE) gptq: the weights are loaded as they are"),
        (["--quantize", "eetq"], "--quantize (QUANTIZE) eetq: bitsandbytes' 8 bits are used"),
    ],
)
def test_a_flag_without_effect_is_noted_in_one_line(argv: list[str], line: str) -> None:
    (said,) = read_settings(argv).notes()
    assert said.startswith(line)
    assert "\n" not in said


def test_the_help_of_every_unused_flag_says_so() -> None:
    for name, field in LauncherFlags.model_fields.items():
        described = (field.description or "").startswith(("unused: ", "refused: "))
        assert described or name in ("num_shard", "sharded")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--num-shard", "2"], "--num-shard (NUM_SHARD) 2: one process serves one GPU"),
        (["--sharded", "true"], "--sharded (SHARDED) true: one process serves one GPU"),
        (["--lora-adapters", "a=b"], "--lora-adapters (LORA_ADAPTERS) a=b: adapters are not"),
    ],
)
def test_a_flag_that_would_change_answers_is_refused(argv: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(argv)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("name", get_args(CheckpointFormat))
def test_the_name_of_a_checkpoints_own_format_leaves_its_weights_alone(name: str) -> None:
    assert read_settings(["--quantize", name]).load_config().quantize is None


@pytest.mark.parametrize("name", get_args(Quantization))
def test_weights_are_quantised_as_they_load(name: str) -> None:
    assert read_settings(["--quantize", name]).load_config().quantize == name


@pytest.mark.parametrize(
    ("argv", "rope"),
    [
        ([], None),
        (["--rope-factor", "2"], ("linear", 2.0)),
        (["--rope-scaling", "dynamic"], ("dynamic", 1.0)),
        (["--rope-scaling", "dynamic", "--rope-factor", "4"], ("dynamic", 4.0)),
    ],
)
def test_a_rope_factor_alone_is_linear_and_a_way_alone_changes_no_length(
    argv: list[str], rope: tuple[str, float] | None
) -> None:
    assert read_settings(argv).load_config().rope == rope


def test_eight_bits_of_eetq_are_those_of_bitsandbytes() -> None:
    assert read_settings(["--quantize", "eetq"]).load_config().quantize == "bitsandbytes"


@pytest.mark.parametrize(("sizes", "on"), [("0", False), ("1,2", True), (None, True)])
def test_cuda_graphs_0_turns_them_off(sizes: str | None, on: bool) -> None:
    argv = [] if sizes is None else ["--cuda-graphs", sizes]
    assert read_settings(argv).engine_config().cuda_graphs is on


def test_origins_are_repeated_or_separated_by_commas() -> None:
    once = read_settings(["--cors-allow-origin", "https://a, https://b"])
    twice = read_settings(["--cors-allow-origin", "https://a", "--cors-allow-origin", "https://b"])
    assert once.cors_allow_origin == twice.cors_allow_origin == ["https://a", "https://b"]


@pytest.mark.parametrize(("text", "colours"), [("1", False), ("0", True), ("true", True)])
def test_log_colorize_1_turns_colours_off_as_in_tgi(
    text: str, colours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOG_COLORIZE", text)
    assert read_settings([]).log_colorize is colours
    assert not read_settings(["--no-log-colorize"]).log_colorize


@pytest.mark.parametrize("flag", ["--env", "-e"])
def test_env_is_a_flag_but_not_a_variable(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENV", "production")
    assert not read_settings([]).env
    assert read_settings([flag]).env


@pytest.fixture
def library_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Without variables of libraries that the server sets; all are put back after the test."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    hub = ("HF_API_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE")
    others = ("TRITON_CACHE_DIR", "TRITON_CACHE_MANAGER", "HF_HUB_DISABLE_TELEMETRY")
    for name in (*hub, *others, *ALLOCATOR):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "token"),
    [
        ({"HF_API_TOKEN": "a", "HF_TOKEN": "b", "HUGGING_FACE_HUB_TOKEN": "c"}, "a"),
        ({"HF_TOKEN": "b", "HUGGING_FACE_HUB_TOKEN": "c"}, "b"),
        ({"HUGGING_FACE_HUB_TOKEN": "c"}, "c"),
        ({}, None),
    ],
)
def test_older_names_of_the_hubs_token_are_read(
    given: dict[str, str], token: str | None, library_environment: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        library_environment.setenv(name, value)
    read_settings(["--huggingface-hub-cache", "/data"]).export_library_settings()
    assert os.environ.get("HF_TOKEN") == token
    assert os.environ["HF_HUB_CACHE"] == "/data"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize(
    "given", [{}, {ALLOCATOR[0]: "a:b"}, {ALLOCATOR[1]: "a:b"}, dict.fromkeys(ALLOCATOR, "a:b")]
)
def test_segments_can_grow_unless_the_user_has_set_torchs_allocator(
    given: dict[str, str], library_environment: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        library_environment.setenv(name, value)
    read_settings([]).export_library_settings()
    expected = given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert {name: os.environ[name] for name in ALLOCATOR if name in os.environ} == expected


@pytest.mark.usefixtures("library_environment")
def test_compiled_kernels_are_kept_beside_the_models(tmp_path: Path) -> None:
    read_settings([]).export_library_settings()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "hub" / "skiff" / "triton")
    assert os.environ["TRITON_CACHE_MANAGER"] == "kernels.compiled:CompiledKernels"


def test_kernels_stay_in_the_folder_that_the_user_names(
    library_environment: pytest.MonkeyPatch,
) -> None:
    library_environment.setenv("TRITON_CACHE_DIR", "/somewhere")
    read_settings([]).export_library_settings()
    assert os.environ["TRITON_CACHE_DIR"] == "/somewhere"


def test_kernels_are_not_kept_where_nothing_can_be_written(
    library_environment: pytest.MonkeyPatch,
) -> None:
    library_environment.setenv("HF_HOME", "/proc/models")
    read_settings([]).export_library_settings()
    assert "TRITON_CACHE_DIR" not in os.environ


def launch(*argv: str, cwd: Path, launcher: Path = LAUNCHER) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [launcher, *argv],
        cwd=cwd,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
def test_the_launcher_runs_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "__main__.py").write_text("print('not this one')")
    answer = launch("--help", cwd=tmp_path)
    assert answer.returncode == 0
    assert answer.stdout.startswith("usage: text-generation-launcher [--flag value ...]")


@pytest.mark.slow
def test_the_launcher_follows_links_to_itself(tmp_path: Path) -> None:
    link = tmp_path / "text-generation-launcher"
    link.symlink_to(LAUNCHER)
    assert launch("--help", cwd=tmp_path, launcher=link).returncode == 0


@pytest.mark.slow
def test_the_launcher_rejects_an_unknown_flag(tmp_path: Path) -> None:
    answer = launch("--no-such-flag", cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stderr == (
        "usage: text-generation-launcher [--flag value ...]\n"
        "text-generation-launcher: error: unrecognized arguments: --no-such-flag\n"
    )


def test_every_setting_is_tested_in_this_file() -> None:
    named = {field_of(flag) for flag, *_ in VALUES} | {field_of(s) for s in SWITCHES + SECRETS}
    named |= {name.lower() for name, *_ in ONLY_IN_THE_ENVIRONMENT}
    others = {"lora_adapters", "stall_timeout", "watchdog_timeout", "log_colorize", "env"}
    platform = VastVariables.model_fields.keys()  # in test_vast_variables.py
    assert named | others == Settings.model_fields.keys() - platform
