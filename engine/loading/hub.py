"""Says quickly that the hub cannot be reached, and turns failed downloads into DownloadFailed."""

import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from engine.core.errors import DownloadFailed
from engine.loading.reasons import full_disk, is_out_of_space, reason

ANSWER_S = 30.0
"""Seconds that the hub may take for its answer, once it was reached."""
_REACH_S = 4.0
"""Seconds that finding and reaching the hub may take. A resolver without a network takes 20 and
more to say so, and a connection that nobody refuses two minutes.
"""


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
