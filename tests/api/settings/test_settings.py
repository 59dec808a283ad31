"""Flags and environment: names, precedence, and clear errors."""

import pytest

from api.settings.config import ConfigError, read_settings
from engine.core.config import DEFAULT_MODEL_ID


def test_defaults_serve_the_default_model() -> None:
    settings = read_settings([])
    assert settings.load_config().model_id == DEFAULT_MODEL_ID
    assert (settings.hostname, settings.port) == ("0.0.0.0", 3000)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_ID", "")
    assert read_settings([]).model_id == DEFAULT_MODEL_ID


def test_a_flag_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_ID", "org/model")
    monkeypatch.setenv("PORT", "80")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "true")
    settings = read_settings(["-p", "81"])
    assert (settings.port, settings.load_config().model_id) == (81, "org/model")
    assert settings.trust_remote_code


def test_settings_reach_the_engine() -> None:
    settings = read_settings(
        ["--max-batch-size", "7", "--max-batch-prefill-tokens", "512", "--max-total-tokens", "99",
         "--cuda-memory-fraction", "0.5", "--no-prefix-caching", "--dtype", "bfloat16",
         "--batch-invariant",
         "--quantize", "bitsandbytes-nf4", "--watermark-gamma", "0.25", "--watermark-delta", "1"]
    )  # fmt: skip
    engine = settings.engine_config()
    assert (engine.max_sequences, engine.max_batch_tokens) == (7, 512)
    assert (engine.max_total_tokens, engine.memory_fraction) == (99, 0.45)
    assert not engine.prefix_caching
    assert engine.watermark == (0.25, 1.0)
    load = settings.load_config()
    assert (load.dtype, load.quantize) == ("bfloat16", "bitsandbytes-nf4")
    assert load.batch_invariant


@pytest.mark.parametrize(("flag", "prepared"), [("5", 20), ("20", 20), ("50", 50)])
def test_the_engine_prepares_for_as_many_top_tokens_as_any_route_allows(
    flag: str, prepared: int
) -> None:
    engine = read_settings(["--max-top-n-tokens", flag]).engine_config()
    assert engine.max_top_tokens == prepared  # the routes of OpenAI allow 20


def test_the_cache_of_a_cpu_has_a_size_of_its_own() -> None:
    assert read_settings([]).engine_config().cpu_cache_bytes is None
    engine = read_settings(["--cpu-cache-gib", "1.5"]).engine_config()
    assert engine.cpu_cache_bytes == 3 << 29


@pytest.mark.parametrize(
    ("argv", "is_cpu", "noted"),
    [
        (["--cuda-memory-fraction", "0.5"], True, ["--cuda-memory-fraction"]),
        (["--cuda-memory-fraction", "1"], True, ["--cuda-memory-fraction"]),
        (["--cuda-memory-fraction", "0.5"], False, []),
        (["--tgi-wiggle-room", "0.5"], True, ["--tgi-wiggle-room"]),
        (["--cpu-cache-gib", "1"], False, ["--cpu-cache-gib"]),
        (["--cpu-cache-gib", "1"], True, []),
        ([], True, []),
        ([], False, []),
    ],
)
def test_a_limit_of_another_kind_of_device_is_noted(
    argv: list[str], is_cpu: bool, noted: list[str]
) -> None:
    notes = list(read_settings(argv).notes_on_device(is_cpu))
    assert [note.split()[0] for note in notes] == noted
    assert all("changes nothing" in note and "\n" not in note for note in notes)


def test_a_limit_from_the_environment_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MEMORY_FRACTION", "0.5")
    assert len(list(read_settings([]).notes_on_device(is_cpu=True))) == 1


@pytest.mark.parametrize("flag", ["--max-input-tokens", "--max-input-length"])
def test_input_tokens_have_two_names(flag: str) -> None:
    assert read_settings([flag, "100"]).limits(2048).max_input_tokens == 100


def test_input_tokens_leave_room_for_one_by_default() -> None:
    assert read_settings([]).limits(2048).max_input_tokens == 2047


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--port", "x"], "--port (PORT): Input should be a valid integer"),
        (
            ["--max-best-of", "0"],
            "--max-best-of (MAX_BEST_OF): `max_best_of` must be > 0, not '0'",
        ),
        (
            ["--validation-workers", "0"],
            "--validation-workers (VALIDATION_WORKERS): `validation_workers` must be > 0, not '0'",
        ),
        (["--dtype", "int8"], "--dtype (DTYPE): Input should be 'float32', 'bfloat16' or"),
        (
            ["--quantize", "int3"],
            "--quantize (QUANTIZE): Input should be 'bitsandbytes', 'bitsandbytes-nf4', "
            "'bitsandbytes-fp4', 'eetq', 'awq', 'compressed-tensors', 'exl2', 'fp8', 'gptq' or "
            "'marlin', not 'int3'",
        ),
        (
            ["--max-input-tokens", "1", "--max-input-length", "1"],
            "Both `max_input_tokens` (1) and `max_input_length` (1) are set. Please define only "
            "`max_input_tokens`",
        ),
        (
            ["--max-total-tokens", "9", "--max-batch-total-tokens", "8"],
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 9 and 8",
        ),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_flag(argv: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(argv)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_input_tokens_must_leave_room_for_output() -> None:
    text = "`max_input_tokens` must be < `max_total_tokens`. Given: 2048 and 2048"
    with pytest.raises(ConfigError, match=text):
        read_settings(["--max-input-tokens", "2048"]).limits(2048)
    with pytest.raises(ConfigError, match=text):
        read_settings(["--max-input-tokens", "2048", "--max-total-tokens", "2048"])


@pytest.mark.parametrize("key", [" x", "x\n", "clé"])
def test_a_key_that_cannot_be_sent_in_a_header_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(["--api-key", key])
    assert str(caught.value) == (
        "--api-key (API_KEY): must be printable ASCII, with no surrounding spaces"
    )


@pytest.mark.parametrize("argv", [["--api-key", ""], ["--api-key="], []])
def test_an_empty_key_does_not_open_the_server(
    argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", "")
    with pytest.raises(ConfigError, match="is empty; leave it out to serve everyone"):
        read_settings(argv)
    monkeypatch.delenv("API_KEY")
    if argv:
        with pytest.raises(ConfigError, match="is empty"):
            read_settings(argv)


@pytest.mark.parametrize(
    ("given", "used"),
    [("localhost", "127.0.0.1"), ("10.0.0.1", "10.0.0.1"), ("3f2a9c", "0.0.0.0"), ("::1", "::1")],
)
def test_a_hostname_that_is_no_address_listens_on_all(given: str, used: str) -> None:
    assert read_settings(["--hostname", given]).hostname == used


def test_help_describes_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--help"])
    text = capsys.readouterr().out
    assert "--max-concurrent-requests int" in text
    assert "more are answered 429 (default: 128)" in " ".join(text.split())
