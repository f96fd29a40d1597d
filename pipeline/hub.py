"""What of a Hugging Face repository is on this machine, and whether the Hub can be asked for the rest.

Without a network every file asked for costs half a minute of retries, and a checkpoint is a dozen of them: so it is
found out once, in seconds, and then nothing is asked for.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from pipeline.errors import UserError

PATIENCE_S = 5.0
REPOSITORY = re.compile(r"^[\w.\-]+(/[\w.\-]+)?$")  # as the Hub names repositories: owner/name
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


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
    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError, ValueError):
        return None


def fetched_folder(path: str, revision: str | None, field: str, wanted: str, patterns: Sequence[str]) -> Path:
    """Return a checkpoint's folder here, fetching from the Hub the files of these patterns when `path` is no folder.

    Raises UserError naming the recipe's `field` and what is `wanted` when the path is neither a folder nor to be had.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{field} is {path!r}, which is neither a folder here nor a model that could be fetched from the "
            f"Hugging Face Hub ({(str(error).splitlines() or [''])[0]}). Give {wanted} folder or Hub id."
        ) from error


def missing_weights(folder: Path) -> list[str]:
    """Return the names of the weight files (safetensors) that a checkpoint's folder lacks.

    A checkpoint in several files lists them in its index; without an index it is one file.
    """
    if not (folder / INDEX).is_file():
        return [] if any(folder.glob("*.safetensors")) else [SINGLE]
    try:
        names = set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return [f"{INDEX} (damaged)"]
    return sorted(name for name in names if not (folder / name).is_file())


def offers_safetensors(path: str, revision: str | None) -> bool:
    """Tell whether a repository on the Hub has weights as safetensors; True when it cannot be asked."""
    try:
        return any(name.endswith(".safetensors") for name in HfApi().list_repo_files(path, revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError):
        return True


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
