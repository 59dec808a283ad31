"""An unreachable hub is reported soon, and a failed download in one sentence."""

import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any, NoReturn

import pytest
from huggingface_hub import constants

from engine.core.errors import DownloadFailed
from engine.loading import checkpoint, hub, lazy_shards
from engine.loading.checkpoint import locate
from tests.engine.models import byte_tokenizer, reference
from tests.hub import MODEL_ID, Hub, serving_hub

SOON_S = 15.0
"""Far less than the minutes that a connection which nobody answers takes to fail, and the twenty
seconds of a resolver.
"""


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def refused() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def check_unreachable(why: str) -> None:
    started = time.monotonic()
    with pytest.raises(DownloadFailed) as caught:
        locate("org/nothing")
    assert time.monotonic() - started < SOON_S
    beginning = "org/nothing is not in the local cache and the hub cannot be reached: "
    assert str(caught.value).startswith(beginning + why)
    assert "\n" not in str(caught.value)


def test_a_refused_connection_is_reported_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, refused())
    check_unreachable("[Errno 111] Connection refused")


def test_a_resolver_without_network_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    released = Event()

    def resolve(*_: object, **__: object) -> NoReturn:
        released.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    use_hub(monkeypatch, "https://hub.example")
    monkeypatch.setattr(hub, "_REACH_S", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    try:
        check_unreachable("hub.example did not answer within")
    finally:
        released.set()


def test_a_name_that_does_not_exist_is_reported_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    use_hub(monkeypatch, "https://hub.example")
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    check_unreachable("[Errno -2] Name or service not known")


@pytest.mark.slow
def test_a_hub_that_takes_connections_and_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint, "ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        check_unreachable("ReadTimeout")


def test_a_proxy_finds_the_hub_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    use_hub(monkeypatch, "http://hub.example")
    hub.check_reachable()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "model"
    reference("llama").save_pretrained(folder, max_shard_size=200_000)
    byte_tokenizer()._hf.save_pretrained(folder)
    with serving_hub(folder) as running:
        use_hub(monkeypatch, running.url)
        yield running


def full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named_with_its_folder(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served.url
    monkeypatch.setattr(checkpoint, "snapshot_download", full)
    with pytest.raises(DownloadFailed, match="could not be downloaded: no space left in") as caught:
        locate(MODEL_ID)
    assert str(tmp_path / "cache") in str(caught.value)
    assert "HF_HOME" in str(caught.value)


def test_a_disk_that_is_full_at_the_last_shard_is_named_with_its_folder(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served.url
    monkeypatch.setattr(lazy_shards, "hf_hub_download", full)
    shards = locate(MODEL_ID).shards
    assert shards is not None
    with pytest.raises(DownloadFailed, match="could not be downloaded: no space left in") as caught:
        shards.wait()
    assert str(tmp_path / "cache") in str(caught.value)


def test_an_index_that_cannot_be_read_is_named(served: Hub) -> None:
    (served.folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(Exception, match=r"model\.safetensors\.index\.json is not JSON"):
        locate(MODEL_ID)


@pytest.mark.parametrize(
    "name", ["/absolute/missing/path", "./missing", "a/b/c", "my model", "~nobody-here/model"]
)
def test_a_name_of_nothing_is_reported_as_a_missing_folder(name: str) -> None:
    with pytest.raises(DownloadFailed) as caught:
        locate(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DownloadFailed, match="is a file: name the model's folder"):
        locate(str(tmp_path / "config.json"))
