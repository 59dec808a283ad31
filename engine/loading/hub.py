"""Names on the hub: says quickly what cannot be found or reached, and why a download failed."""

import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from engine.core.config import DEFAULT_MODEL_ID
from engine.core.errors import DownloadFailed
from engine.loading.reasons import full_disk, is_out_of_space, reason

ANSWER_S = 30.0
"""Seconds that the hub may take for its answer, once it was reached."""
_REACH_S = 4.0
"""Seconds that finding and reaching the hub may take. A resolver without a network takes 20 and
more to say so, and a connection that nobody refuses two minutes.
"""


def check_model_id(model_id: str, revision: str | None = None) -> None:
    """Raise DownloadFailed if there is no such place, or the hub would be needed and is out of
    reach. Needs no torch, so that a start which must fail does so before torch is imported.
    """
    if model_id == DEFAULT_MODEL_ID or existing_path(model_id) is not None:
        return
    check_is_hub_id(model_id)
    try:
        check_reachable()
    except OSError as error:
        cached_snapshot(model_id, revision, error)


def existing_path(model_id: str) -> Path | None:
    """Return the file or folder of this name; None if there is none. Raises DownloadFailed if that
    cannot be found out.
    """
    try:
        path = Path(model_id).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError) as error:  # a folder that may not be entered; no such user
        raise DownloadFailed(f"{model_id} cannot be read: {reason(error)}") from error


def check_is_hub_id(model_id: str) -> None:
    """Raise DownloadFailed if something that is no file or folder is no name on the hub either."""
    if model_id.endswith(".gguf"):
        raise DownloadFailed(f"there is no file {model_id}")
    try:
        validate_repo_id(model_id)
    except HFValidationError:
        raise DownloadFailed(
            f"there is no folder {model_id}, and it cannot be the name of a model on the hub "
            "(owner/name)"
        ) from None


def cached_snapshot(model_id: str, revision: str | None, error: Exception) -> Path:
    """Return the folder of a model that was downloaded earlier, where the hub is out of reach
    because of `error`. Raises DownloadFailed if there is none.
    """
    try:
        return Path(snapshot_download(model_id, revision=revision, local_files_only=True))
    except OSError:
        raise DownloadFailed(
            f"{model_id} is not in the local cache and the hub cannot be reached: {reason(error)}"
        ) from error


def check_reachable() -> None:
    """Raise OSError if the hub cannot be reached within a few seconds.

    Nothing is checked behind a proxy, which finds the hub in its own way, or if huggingface_hub
    was told to stay offline.
    """
    url = urllib.parse.urlsplit(constants.ENDPOINT)
    proxies = urllib.request.getproxies()
    if (
        constants.HF_HUB_OFFLINE
        or url.hostname is None
        or url.scheme in proxies
        or "all" in proxies
    ):
        return
    port = url.port or (443 if url.scheme == "https" else 80)
    _within_time(url.hostname, port)


def _within_time(host: str, port: int) -> None:
    """Connect and disconnect in a thread of its own: nothing else limits the resolver's time."""
    reached: Future[None] = Future()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=_REACH_S).close()
        except OSError as error:
            reached.set_exception(error)
        else:
            reached.set_result(None)

    threading.Thread(target=connect, name="skiff-reach-hub", daemon=True).start()
    try:
        reached.result(_REACH_S)
    except TimeoutError:
        raise OSError(f"{host} did not answer within {_REACH_S:.0f} s") from None


@contextmanager
def download_errors(model_id: str) -> Iterator[None]:
    """Turn whatever goes wrong in a download into DownloadFailed."""
    try:
        yield
    except DownloadFailed:
        raise
    except Exception as error:
        cache = Path(constants.HF_HUB_CACHE)
        why = full_disk(cache) if is_out_of_space(error) else reason(error)
        raise DownloadFailed(f"{model_id} could not be downloaded: {why}") from error
