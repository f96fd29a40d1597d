"""Adapters on the Hugging Face Hub: fetched into its cache, or found there without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

from pipeline.errors import UserError
from pipeline.files.paths import RUNS
from pipeline.hub import repository as hub


def is_on_hub(path: str) -> bool:
    """Whether a path names an adapter on the Hub, `USER/NAME` or `USER/NAME@REVISION`, and not one here.

    A path whose first folder exists here, or is the default one of runs, is a local one that is misspelled or not
    there yet: nothing is asked about it.
    """
    repository = path.partition("@")[0]
    local = Path(path).exists() or Path(path).parent.is_dir() or path.startswith(f"{RUNS}/")
    return "/" in repository and not local and hub.is_repository(repository)


def adapter_folder(path: str, needed: Sequence[str], optional: Sequence[str]) -> Path:
    """The folder in the cache with the files of an adapter on the Hub, at a commit or branch where `path` names one.

    `needed` are the files that an adapter has, the one that shows what it is first; those of `optional` are fetched
    where it has them, and nothing else is. Without a connection, the copy in the cache is used. Raises UserError where
    there is none, and for a repository that is no adapter.
    """
    repository, _, named = path.partition("@")
    revision = named or None
    reason = "the Hub cannot be reached from here, or HF_HUB_OFFLINE is set"
    if hub.reachable():
        try:
            return _fetch(repository, revision, needed, optional)
        except UserError:
            raise
        # huggingface_hub raises errors of its own, of the operating system, and of its HTTP library, which differs
        # between its major versions.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    found = try_to_load_from_cache(repository, needed[0], revision=revision)
    if isinstance(found, str) and all((Path(found).parent / name).is_file() for name in needed):
        return Path(found).parent
    raise UserError(
        f"'{path}' is neither a folder here nor an adapter that could be fetched from the Hugging Face Hub "
        f"({reason}). Give the folder of a run or an adapter; `hf download {repository}` fetches one where the Hub can "
        "be reached."
    )


def _fetch(repository: str, revision: str | None, needed: Sequence[str], optional: Sequence[str]) -> Path:
    # One request that is not retried shows whether the Hub responds, and what the repository has.
    info = HfApi().model_info(repository, revision=revision, timeout=hub.PATIENCE_S)
    names = {found.rfilename for found in info.siblings or []}
    missing = [name for name in needed if name not in names]
    if missing:
        raise UserError(
            f"'{repository}' on the Hugging Face Hub has no {missing[0]}; expected an adapter, as `export --push` "
            "uploads it."
        )
    # By branch, so that the cache knows its commit without a network; the others by that commit, as it may move.
    folder = Path(hf_hub_download(repository, needed[0], revision=revision)).parent
    for name in (*needed[1:], *(name for name in optional if name in names)):
        hf_hub_download(repository, name, revision=folder.name)
    return folder
