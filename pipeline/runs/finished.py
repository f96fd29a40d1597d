"""Folders of finished training: tensors by name and meta.json, readable at any world size.

A folder is renamed to its final name once all its files are on the disk, and holds hashes of them, so a reader can
tell a complete folder from an incomplete or damaged one. The tensors are all in one file: for ModalPrompt on
LLaVA-1.5-7B about 80 MB, most of them the projection head.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files.atomic import (
    NFS_OPEN,
    remove_folder,
    sha256,
    sync_folder,
    write_synced,
)
from pipeline.runs.layout import COMPLETE, META, RESUME, TENSORS

FORMAT_VERSION = 1


def finish_folder(
    work: Path,
    final: Path,
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    replace: Callable[[Path], object] = remove_folder,
) -> Path:
    """Write tensors and meta.json into `work` and rename it to `final` atomically.

    Args:
        work: folder of the training in progress; may hold checkpoints, which are removed at the end.
        final: the finished folder; one that exists there is replaced.
        tensors: what was learned, by name, each in the precision that it is kept in.
        meta: content of meta.json.
        replace: called with the folder that exists there, when the new one is whole; frees its name.
    """
    work.mkdir(parents=True, exist_ok=True)
    write_synced(work / TENSORS, save({key: value.contiguous() for key, value in tensors.items()}))
    meta = {"format": FORMAT_VERSION, **meta, "sha256": sha256(work / TENSORS)}
    (work / META).write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (work / COMPLETE).write_text(sha256(work / META) + "\n")
    for path in work.iterdir():
        if path.is_file() and not path.name.startswith(NFS_OPEN):  # a removed file that a process still has open
            with path.open("rb") as file:
                os.fsync(file.fileno())  # before the rename: after a power cut the folder must not lack a content
    sync_folder(work)
    if final.exists():  # a damaged or incomplete folder, or one that is put aside
        replace(final)
    work.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(final / RESUME, ignore_errors=True)  # last: until the rename, only the checkpoints can be resumed
    return final


def read_finished(folder: Path, fix: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and meta.json of a finished folder; None for an unfinished one, UserError ending in `fix` if damaged."""
    if not (folder / COMPLETE).is_file():
        return None
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        expected = meta["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / META} cannot be read ({type(error).__name__}: {error}). {fix}") from error
    said = (folder / COMPLETE).read_text("utf-8", errors="replace").strip()  # empty in folders of earlier versions
    if said and said != sha256(folder / META):
        raise UserError(f"{folder / META} is not the file that {COMPLETE} describes (its sha256). {fix}")
    if meta.get("format") != FORMAT_VERSION:
        raise UserError(f"{folder} has checkpoint format {meta.get('format')}, expected {FORMAT_VERSION}. {fix}")
    if not (folder / TENSORS).is_file() or sha256(folder / TENSORS) != expected:
        raise UserError(f"{folder / TENSORS} is missing or not the file that {META} describes (its sha256). {fix}")
    try:
        with safe_open(str(folder / TENSORS), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UserError(f"{folder / TENSORS} lacks a tensor or cannot be read ({error}). {fix}") from error
