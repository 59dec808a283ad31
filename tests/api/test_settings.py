"""Flags and environment: names, precedence, and refusals worth reading."""

import pytest

from api.config import ConfigError, read_settings
from engine.config import DEFAULT_MODEL_ID


def test_defaults_serve_the_default_model() -> None:
    settings = read_settings([])
    assert settings.load_config().model_id == DEFAULT_MODEL_ID
    assert (settings.hostname, settings.port) == ("0.0.0.0", 8080)


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_ID", "")
    assert read_settings([]).model_id == DEFAULT_MODEL_ID


def test_the_environment_sets_and_a_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_ID", "org/model")
    monkeypatch.setenv("PORT", "80")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "true")
    settings = read_settings(["-p", "81"])
    assert (settings.port, settings.load_config().model_id) == (81, "org/model")
    assert settings.trust_remote_code


def test_settings_reach_the_engine() -> None:
    settings = read_settings(
        ["--max-batch-size", "7", "--max-batch-prefill-tokens", "512", "--max-total-tokens", "99",
         "--cuda-memory-fraction", "0.5", "--disable-prefix-caching", "--dtype", "bfloat16",
         "--quantize", "bitsandbytes-nf4"]
    )  # fmt: skip
    engine = settings.engine_config()
    assert (engine.max_sequences, engine.max_batch_tokens) == (7, 512)
    assert (engine.max_total_tokens, engine.memory_fraction) == (99, 0.5)
    assert not engine.prefix_caching
    load = settings.load_config()
    assert (load.dtype, load.quantize) == ("bfloat16", "bitsandbytes-nf4")


@pytest.mark.parametrize("flag", ["--max-input-tokens", "--max-input-length"])
def test_input_tokens_have_two_names(flag: str) -> None:
    assert read_settings([flag, "100"]).limits(2048).max_input_tokens == 100


def test_input_tokens_leave_room_for_one_by_default() -> None:
    assert read_settings([]).limits(2048).max_input_tokens == 2047


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--port", "x"], "--port (PORT): Input should be a valid integer"),
        (["--max-best-of", "0"], "--max-best-of (MAX_BEST_OF): Input should be greater than 0"),
        (["--dtype", "int8"], "--dtype (DTYPE): Input should be 'float32', 'bfloat16' or"),
        (
            ["--quantize", "awq"],
            "--quantize (QUANTIZE): Input should be 'bitsandbytes', 'bitsandbytes-nf4' or "
            "'bitsandbytes-fp4', not 'awq'",
        ),
        (
            ["--max-input-tokens", "1", "--max-input-length", "1"],
            "give --max-input-tokens or --max-input-length, not both",
        ),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_flag(argv: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(argv)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_input_tokens_must_leave_room_for_output() -> None:
    text = "--max-input-tokens 2048: must be less than the 2048"
    with pytest.raises(ConfigError, match=text):
        read_settings(["--max-input-tokens", "2048"]).limits(2048)
    with pytest.raises(ConfigError, match=text):
        read_settings(["--max-input-tokens", "2048", "--max-total-tokens", "2048"])


@pytest.mark.parametrize(
    ("given", "used"),
    [("localhost", "127.0.0.1"), ("10.0.0.1", "10.0.0.1"), ("3f2a9c", "0.0.0.0"), ("::1", "::1")],
)
def test_a_hostname_that_is_no_address_means_all(given: str, used: str) -> None:
    assert read_settings(["--hostname", given]).hostname == used


def test_help_describes_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--help"])
    text = capsys.readouterr().out
    assert "--max-concurrent-requests int" in text
    assert "more are answered 429 (default: 128)" in " ".join(text.split())
