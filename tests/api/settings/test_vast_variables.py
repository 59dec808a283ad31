"""Vast's environment variables: what they set, and the errors when they are wrong."""

from pathlib import Path
from typing import Any

import pytest

from api.settings.config import ConfigError, platform_identity, read_settings
from api.settings.vast_variables import VastVariables

PLATFORM = {
    "CONTAINER_ID": "4242",
    "MASTER_TOKEN": "token",
    "REPORT_ADDR": "https://run.vast.ai",
    "PUBLIC_IPADDR": "203.0.113.7",
    "VAST_TCP_PORT_3000": "41234",
}
TRIED: dict[str, tuple[str, Any]] = {
    "CONTAINER_ID": ("7", 7),
    "VAST_CONTAINERLABEL": ("C.7", "C.7"),
    "REPORT_ADDR": ("http://a, http://b/", "http://a, http://b/"),
    "PUBLIC_IPADDR": ("1.2.3.4", "1.2.3.4"),
    "WORKER_PORT": ("3001", 3001),
    "WORKER_HTTP_PORT": ("3002", 3002),
    "USE_SSL": ("false", False),
    "UNSECURED": ("Yes", True),
    "MAX_QUEUE_TIME": ("600.0", 600.0),
    "MAX_SESSIONS": ("0", 0),
    "VAST_CONSOLE_URL": ("http://console/", "http://console"),
    "TLS_DIRECTORY": ("/tls", Path("/tls")),
    "BENCHMARK_CACHE": ("/cache", Path("/cache")),
    "BENCHMARK_SECONDS": ("5", 5.0),
    "BACKEND": ("tgi", "tgi"),
    "MODEL_LOG": ("/log", Path("/log")),
    "MODEL_HEALTH_ENDPOINT": ("/health", "/health"),
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in PLATFORM.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("name", TRIED)
def test_each_variable_sets_its_field(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, expected = TRIED[name]
    monkeypatch.setenv(name, given)
    assert getattr(read_settings([]), name.lower()) == expected


def test_every_variable_is_tested_in_this_file() -> None:
    assert {n.lower() for n in TRIED} | {"master_token"} == VastVariables.model_fields.keys()


def test_without_vasts_variables_skiff_is_a_plain_server() -> None:
    settings = read_settings([])
    assert settings.vast_mode is None
    assert settings.address == ("0.0.0.0", 3000)


def test_an_instance_that_is_no_worker_is_a_plain_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTAINER_ID", "4242")
    monkeypatch.setenv("PUBLIC_IPADDR", "203.0.113.7")
    assert read_settings([]).vast_mode is None
    assert platform_identity() is None


@pytest.mark.parametrize("known_by", ["MASTER_TOKEN", "REPORT_ADDR"])
def test_what_the_autoscaler_sets_makes_a_worker(
    known_by: str, environment: pytest.MonkeyPatch
) -> None:
    environment.delenv({"MASTER_TOKEN": "REPORT_ADDR", "REPORT_ADDR": "MASTER_TOKEN"}[known_by])
    assert read_settings([]).vast_mode == "worker"


def test_a_workers_configuration_is_read_from_the_environment(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("REPORT_ADDR", "https://one.example/api/, https://two.example")
    config = read_settings([]).vast_worker()
    assert config.identity.container_id == 4242
    assert config.identity.url == "https://203.0.113.7:41234"
    assert config.identity.master_token.get_secret_value() == "token"
    assert config.identity.report_addresses == ("https://one.example/api", "https://two.example")
    assert config.port == 3000
    assert config.use_ssl
    assert not config.unsecured


def test_the_default_report_address_is_vasts(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.delenv("REPORT_ADDR")
    assert read_settings([]).vast_worker().identity.report_addresses == ("https://run.vast.ai",)


def test_the_url_of_a_worker_without_tls_is_http(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("USE_SSL", "false")
    assert read_settings([]).vast_worker().identity.url == "http://203.0.113.7:41234"


def test_the_container_label_is_used_if_container_id_is_not_set(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.delenv("CONTAINER_ID")
    environment.setenv("VAST_CONTAINERLABEL", "C.99")
    assert read_settings([]).vast_worker().identity.container_id == 99


def test_a_worker_listens_on_a_port_that_vast_chose(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WORKER_PORT", "70000")
    environment.setenv("VAST_TCP_PORT_70000", "23456")
    config = read_settings([]).vast_worker()
    assert config.port == 23456
    assert config.identity.url == "https://203.0.113.7:23456"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PUBLIC_IPADDR", "", "PUBLIC_IPADDR: is not set; it is the machine's public address"),
        (
            "VAST_TCP_PORT_3000",
            "",
            "VAST_TCP_PORT_3000: is not a port; publish the worker's port (-p 3000:3000 in the "
            "template's options)",
        ),
        ("USE_SSL", "maybe", "--use-ssl (USE_SSL) maybe: must be true or false"),
        ("UNSECURED", "2", "--unsecured (UNSECURED) 2: must be true or false"),
        (
            "REPORT_ADDR",
            "run.vast.ai",
            "--report-addr (REPORT_ADDR) run.vast.ai: must begin with http:// or https://",
        ),
        (
            "CONTAINER_ID",
            "x",
            "--container-id (CONTAINER_ID): Input should be a valid integer, unable to parse "
            "string as an integer, not 'x'",
        ),
    ],
)
def test_the_error_for_a_wrong_variable_names_it_and_what_it_should_be(
    name: str, value: str, message: str, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        read_settings([]).vast_worker()
    assert str(refused.value) == message


def test_the_identity_is_known_even_if_the_settings_are_invalid(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("MAX_BEST_OF", "none")
    environment.setenv("REPORT_ADDR", "nonsense")
    identity = platform_identity()
    assert identity is not None
    assert identity.container_id == 4242
    assert identity.report_addresses == ("https://run.vast.ai",)


def test_behind_a_pyworker_skiff_listens_on_loopback_only(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("BACKEND", "tgi")
    environment.setenv("HOSTNAME", "0.0.0.0")
    environment.setenv("PORT", "80")  # as an image has it
    settings = read_settings([])
    assert settings.vast_mode == "behind pyworker"
    assert settings.address == ("127.0.0.1", 5001)
    assert platform_identity() is None


def test_behind_a_pyworker_the_port_can_be_set_by_flag(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("BACKEND", "tgi")
    assert read_settings(["--port", "5002"]).address == ("127.0.0.1", 5002)


def test_the_settings_do_not_print_the_master_token(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MASTER_TOKEN", "a-secret")
    settings = read_settings([])
    assert "a-secret" not in f"{settings} {settings.vast_worker()}"
