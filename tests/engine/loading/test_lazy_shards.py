"""A model from the hub is loaded while it is downloaded; failed downloads are reported."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors
from huggingface_hub import constants

from engine.core.config import LoadConfig
from engine.core.errors import DownloadFailed
from engine.core.metrics import ColdStart
from engine.loading import lazy_shards
from engine.loading.folder_faults import INDEX
from engine.loading.loader import load
from tests.engine.driving import check_greedy, greedy, make_engine, run
from tests.engine.models import byte_tokenizer, reference
from tests.hub import COMMIT, MODEL_ID, Hub, serving_hub

FIRST, LAST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CONFIG = LoadConfig(MODEL_ID, dtype="float32")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in for the hub, with a small llama of two shards."""
    folder = tmp_path / "model"
    model = reference("llama")
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size * 6 // 10)
    byte_tokenizer()._hf.save_pretrained(folder)
    with serving_hub(folder) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        assert {FIRST, LAST} < set(served.names())
        yield served


@pytest.mark.usefixtures("hub")
def test_a_model_from_the_hub_is_served() -> None:
    cold_start = ColdStart()
    loaded = load(CONFIG, cold_start)
    request = greedy([1, 2, 3], 10)
    check_greedy(reference("llama"), run(make_engine(loaded), [(0, request)]), request)
    assert loaded.info.sha == COMMIT
    assert list(cold_start.seconds) == ["download", "load", "verify"]
    assert all(seconds > 0 for seconds in cold_start.seconds.values())


def test_the_first_shard_is_loaded_while_the_last_one_is_downloaded(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    loading_first = threading.Event()

    def safe_open(path: str, framework: str) -> object:
        opened.append(Path(path).name)
        loading_first.set()
        return safetensors_open(path, framework)

    safetensors_open = safetensors.safe_open
    monkeypatch.setattr(lazy_shards, "safe_open", safe_open)
    hub.hold(LAST)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load, CONFIG)
        assert loading_first.wait(30)
        assert set(opened) == {FIRST}
        assert not loading.done()
        hub.held[LAST].set()
        loaded = loading.result(60)
    request = greedy([1, 2, 3], 10)
    check_greedy(reference("llama"), run(make_engine(loaded), [(0, request)]), request)


@pytest.mark.parametrize("held", [FIRST, "model.safetensors"], ids=["shards", "one file"])
def test_the_folder_is_told_before_any_weights_are_there(hub: Hub, held: str) -> None:
    if held not in hub.names():
        reference("llama").save_pretrained(hub.folder)
        for name in (FIRST, LAST, INDEX):
            (hub.folder / name).unlink(missing_ok=True)
    hub.hold(held)
    found: Future[Path] = Future()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load, CONFIG, found=found.set_result)
        folder = found.result(30)
        assert {"config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
        assert not (folder / held).exists()
        hub.held[held].set()
        loading.result(60)
    assert (folder / held).exists()


@pytest.mark.slow
def test_a_download_that_was_cut_off_is_resumed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut[LAST] = 4000
    load(CONFIG)
    ranges = [wanted for name, wanted in hub.asked if name == LAST]
    assert ranges == [None, "bytes=4000-"]


def test_cached_shards_are_not_downloaded_again(hub: Hub) -> None:
    load(CONFIG)
    hub.asked.clear()
    load(CONFIG)
    assert hub.asked == []


def test_a_shard_missing_on_the_hub_fails_the_download(hub: Hub) -> None:
    (hub.folder / LAST).unlink()
    with pytest.raises(DownloadFailed, match=r"org/model could not be downloaded: .*404"):
        load(CONFIG)
