"""Resolve each checkpoint to one local folder: one process fetches it, and all ranks load every part from there.

Loading a part by a Hub id makes a dozen requests on every rank; loading from a folder makes none. The folder is
complete, weights included, before it is fingerprinted or loaded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download

from pipeline.errors import UserError
from pipeline.files.atomic import replacing
from pipeline.hub import repository as hub
from pipeline.hub.pickled import SETTINGS, with_safetensors
from pipeline.hub.weights import weights_of
from pipeline.ranks.world import ROUND_S, World, broadcast_object, in_rounds, together

log = logging.getLogger("pipeline.hub.snapshots")
SAFE_WEIGHTS, PICKLED_WEIGHTS = ("model*.safetensors",), ("pytorch_model*.bin",)
CONNECTIONS = 4  # parallel downloads
FETCHING = "fetching"  # name of the thread that fetches


@dataclass(frozen=True)
class Source:
    """A checkpoint as a recipe names it; `field` and `wanted` are for error messages."""

    path: str
    revision: str | None = None
    field: str = "model.path"
    wanted: str = "a multimodal model's"
    kinds: tuple[str, ...] = ()  # the values of `model_type` that are supported; empty: any


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint on this machine; `commit` is that of the repository on the Hub, "" for the user's own folder."""

    folder: Path
    commit: str = ""


# Resolved once per process: when a branch moves during a run, its stages must not load different models.
_known: dict[tuple[str, str | None], Snapshot] = {}
_settings: dict[tuple[str, str | None], Path] = {}  # folders that may lack weights


def checkpoint(source: Source) -> Snapshot:
    """The complete checkpoint with its weights as safetensors; fetched and converted where that is needed.

    Raises UserError that names the field when it cannot be fetched, or when weights are missing.
    """
    known = _known.get((source.path, source.revision))
    if known is not None and known.folder.is_dir():
        return known
    if Path(source.path).is_dir():
        _require_kind(source, Path(source.path))
        return Snapshot(_whole(source, Path(source.path)))
    folder = _fetched(source, weights=True)
    found = Snapshot(_whole(source, folder), folder.name)
    _known[source.path, source.revision] = found
    return found


def settings_folder(source: Source) -> Path:
    """A folder with the checkpoint's configuration, tokenizer and processor; fetches no weights."""
    key = source.path, source.revision
    if Path(source.path).is_dir() and key not in _known:
        return Path(source.path)
    folder = _known[key].folder if key in _known else _settings.get(key)
    if folder is None or not folder.is_dir():
        folder = _settings[key] = _fetched(source, weights=False)
    return folder


def share(world: World, sources: Iterable[Source], each_round: Callable[[], object] = lambda: None) -> None:
    """Resolve checkpoints on rank 0 and broadcast them; on a node that cannot see rank 0's cache one rank fetches them.

    All ranks must call it. While one of them fetches, all call `each_round` together every ROUND_S seconds.
    """
    for source in sources:
        found = broadcast_object(_while_others_wait(world, world.main, partial(checkpoint, source), each_round))
        assert found is not None
        # By commit, because the branch may have moved since rank 0 resolved it.
        same = replace(source, revision=found.commit or source.revision)

        def here(told: Snapshot = found, same: Source = same) -> Snapshot:
            return told if weights_of(told.folder).files and weights_of(told.folder).whole else checkpoint(same)

        def by_now(told: Snapshot = found, same: Source = same, here: Callable[[], Snapshot] = here) -> Snapshot:
            return _fetched_beside(told, same) or here()

        _while_others_wait(world, world.local_rank == 0, here, each_round)
        resolved = together(by_now)
        if resolved.commit:  # the user's own folder may change, so it is resolved anew each time
            _known[source.path, source.revision] = resolved


def _fetched_beside(told: Snapshot, source: Source) -> Snapshot | None:
    """The snapshot that another process of this node fetched, where rank 0's folder is not visible; without the Hub."""
    if not told.commit or weights_of(told.folder).whole:
        return None
    folder = hub.local_folder(source.path, told.commit)
    if folder is None or not weights_of(folder).whole:
        return None
    return Snapshot(_whole(source, folder), told.commit)


def _while_others_wait(
    world: World, mine: bool, work: Callable[[], Snapshot], each_round: Callable[[], object]
) -> Snapshot | None:
    """Run `work` on the ranks with `mine` set while all wait in rounds; a UserError of it is raised on all ranks."""
    results: list[Snapshot] = []
    errors: list[UserError] = []

    def run() -> None:
        try:
            results.append(work())
        except UserError as error:
            errors.append(error)
        except Exception as error:
            errors.append(UserError(f"A checkpoint could not be fetched ({type(error).__name__}: {error})."))

    # A daemon thread, which does not keep the process alive when a download waits for a lost network.
    thread = threading.Thread(target=run, name=FETCHING, daemon=True) if mine else None
    in_rounds(world, thread, each_round, ROUND_S)

    def result() -> Snapshot | None:
        if errors:
            raise errors[0]
        return results[0] if results else None

    return together(result)


def _require_kind(source: Source, folder: Path) -> None:
    """Raise UserError for an unsupported type of model, before its weights are fetched."""
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # whatever loads the configuration reports this
    if source.kinds and kind not in source.kinds:
        raise UserError(
            f"{source.field}: '{source.path}' is a model of type '{kind}'; supported are {', '.join(source.kinds)}. "
            f"Set {source.field} to {source.wanted} folder or Hub id."
        )


def _whole(source: Source, folder: Path) -> Path:
    try:
        return with_safetensors(folder)
    except UserError as error:
        raise UserError(f"{source.field}: {error}") from error


def _fetched(source: Source, weights: bool) -> Path:
    """The repository's folder in the cache, fetched where the Hub can be reached; else the cached copy, if complete."""
    path, revision = source.path, source.revision
    reason = "the Hub cannot be reached from here, or HF_HUB_OFFLINE is set"
    if not hub.is_repository(path):
        reason = "it is not the name of a repository"
    elif hub.reachable():
        try:
            return _fetch(source, weights)
        except UserError:
            raise
        # huggingface_hub raises errors of its own, of the operating system, and of its HTTP library, which differs
        # between its major versions.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    folder = hub.local_folder(path, revision)
    if folder is not None and (not weights or weights_of(folder).whole):
        if hub.reachable():
            log.warning(
                "%s: the Hub did not give %s (%s); the copy here is used (%s).", source.field, path, reason, folder.name
            )
        return folder
    raise UserError(
        f"{source.field} is {path!r}, which is neither a folder here nor a model that could be fetched from the "
        f"Hugging Face Hub ({reason}). Give {source.wanted} folder or Hub id; what was fetched so far is kept, and "
        f"`hf download {path}` fetches it where the Hub can be reached."
    )


def _fetch(source: Source, weights: bool) -> Path:
    path, revision = source.path, source.revision
    # One request that is not retried shows whether the Hub responds; where it does not, each file would be retried for
    # half a minute.
    info = HfApi().model_info(path, revision=revision, timeout=hub.PATIENCE_S)
    commit = str(info.sha)
    folder = Path(hf_hub_download(path, "config.json", revision=commit)).parent
    _require_kind(source, folder)
    names = [found.rfilename for found in info.siblings or [] if "/" not in found.rfilename]
    wanted = list(_matching(names, SETTINGS))
    if weights:
        wanted += list(_matching(names, SAFE_WEIGHTS)) or list(_matching(names, PICKLED_WEIGHTS))
    missing = [name for name in wanted if not (folder / name).is_file()]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(lambda name: hf_hub_download(path, name, revision=commit), missing))
    if revision != commit:
        _remember(folder, revision or constants.DEFAULT_REVISION)
    return folder


def _remember(folder: Path, branch: str) -> None:
    """Write a branch's commit to the cache's refs, as huggingface_hub does when a file is fetched by branch."""
    with contextlib.suppress(OSError), replacing(folder.parent.parent / "refs" / branch) as temporary:
        temporary.write_text(folder.name)


def _matching(names: list[str], patterns: tuple[str, ...]) -> Iterator[str]:
    return (name for name in names if any(fnmatch(name, pattern) for pattern in patterns))
