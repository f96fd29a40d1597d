"""Which files of a Hugging Face repository are in the local cache, and whether the Hub can be reached for the others.

Without a network `huggingface_hub` retries each request for half a minute, and a checkpoint takes a dozen. So the
connection is tested once, within seconds, and without one no request is made.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

PATIENCE_S = 5.0  # timeout of the test for a connection, and of a request for a repository's file names
REPOSITORY = re.compile(r"^[\w.\-]+(/[\w.\-]+)?$")  # name of a repository on the Hub: owner/name, or name
Offer = Literal["safetensors", "pickled", "none"]


def is_repository(path: str) -> bool:
    """Whether a path of a recipe names a repository on the Hub and not a local folder."""
    return not Path(path).exists() and REPOSITORY.match(path) is not None and not path.startswith(".")


def reachable() -> bool:
    """Whether a connection to the Hub, or to the configured proxy, opens within PATIENCE_S; tried once a process."""
    return not constants.is_offline_mode() and _connects(constants.ENDPOINT)


@contextlib.contextmanager
def no_waiting(paths: Iterable[str]) -> Iterator[bool]:
    """Set `huggingface_hub` offline while the block runs, unless the Hub can be reached; yields whether it can.

    `paths` are the recipe's checkpoints. When none is a repository, the Hub is not needed and no connection is tried.
    """
    online = any(map(is_repository, paths)) and reachable()
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not online
    try:
        yield online
    finally:
        constants.HF_HUB_OFFLINE = before


def local_folder(path: str, revision: str | None) -> Path | None:
    """Return a checkpoint's local folder, which may lack files; None when its config.json is not in the cache."""
    if Path(path).is_dir():
        return Path(path)
    if not is_repository(path):
        return None
    try:
        config = try_to_load_from_cache(path, "config.json", revision=revision)
    except (HFValidationError, OSError, ValueError):
        return None
    return Path(config).parent if isinstance(config, str) else None


def offered_weights(path: str, revision: str | None) -> Offer | None:
    """The format of the weights in a repository on the Hub, from its list of files; None when the request fails."""
    try:
        info = HfApi().model_info(path, revision=revision, timeout=PATIENCE_S)
    # huggingface_hub raises errors of its own and of its HTTP library, which differs between its major versions.
    except Exception:
        return None
    names = [found.rfilename for found in info.siblings or []]
    if any(name.endswith(".safetensors") for name in names):
        return "safetensors"
    return "pickled" if any(name.endswith(".bin") for name in names) else "none"


@cache
def _connects(endpoint: str) -> bool:
    target = urlsplit(endpoint)
    proxy = getproxies().get(target.scheme)
    if proxy and not proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = target.port or (80 if target.scheme == "http" else 443)
    found = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((target.hostname or "", port), PATIENCE_S):
            found.set()

    # In a thread, because the name lookup (getaddrinfo) has no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return found.is_set()
