"""What of a Hugging Face repository is on this machine, and whether the Hub can be asked for the rest.

Without a network every file asked for costs half a minute of retries, and a checkpoint is a dozen of them: so it is
found out once, in seconds, and then nothing is asked for.
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

PATIENCE_S = 5.0
REPOSITORY = re.compile(r"^[\w.\-]+(/[\w.\-]+)?$")  # as the Hub names repositories: owner/name
Offer = Literal["safetensors", "pickled", "none"]


def is_repository(path: str) -> bool:
    """Tell whether a path of a recipe means a repository of the Hub and not a folder here."""
    return not Path(path).exists() and REPOSITORY.match(path) is not None and not path.startswith(".")


def reachable() -> bool:
    """Tell within seconds whether the Hub, or the proxy on the way to it, can be connected to."""
    return not constants.is_offline_mode() and _connects(constants.ENDPOINT)


@contextlib.contextmanager
def no_waiting(paths: Iterable[str]) -> Iterator[bool]:
    """While the block runs, nothing is asked of a Hub that cannot be reached; yields whether it can be.

    `paths` are those of the recipe: when none is a repository, there is nothing to ask and the Hub is not tried.
    """
    online = any(map(is_repository, paths)) and reachable()
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not online
    try:
        yield online
    finally:
        constants.HF_HUB_OFFLINE = before


def local_folder(path: str, revision: str | None) -> Path | None:
    """Return the folder of a checkpoint as far as it is on this machine; None when nothing of it is."""
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
    """Tell in which format a repository on the Hub has weights, without fetching them; None when it cannot be asked."""
    try:
        info = HfApi().model_info(path, revision=revision, timeout=PATIENCE_S)
    # The client raises errors of its own and of its HTTP library, which is another one in each major version.
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

    # In a thread, for looking up the name knows no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return found.is_set()
