"""Lists the files of a dataset repository on the Hugging Face Hub or a mirror of it, with their sizes and hashes."""

from __future__ import annotations

import json
import urllib.parse
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.download.fetch import Patience, Wanted, reading
from data_prep.download.manifest import Instructions
from data_prep.sources.addresses import plain_name
from pipeline.errors import UserError

HUB = "https://huggingface.co"
PAGES = 1000  # of a listing, beyond which the answer is taken for wrong


def instruction_files(
    source: Instructions, tasks: list[str], root: Path, endpoint: str, patience: Patience
) -> list[Wanted]:
    """The files of tasks in a repository at its newest commit; UserError where a task has none there.

    A file belongs to a task if a folder of its path, or its own name, is the task's. Raises as `fetch` does.
    """
    base = f"{endpoint}/api/datasets/{source.repository}"
    with reading(base, patience) as answer:
        commit = str(json.load(answer).get("sha", "main"))
    place = f"/{urllib.parse.quote(source.folder)}" if source.folder else ""
    listed = _listed(f"{base}/tree/{commit}{place}?recursive=true", patience)
    found: list[Wanted] = []
    lacking = []
    for task in tasks:
        files = [entry for entry in listed if entry.get("type") == "file" and _is_of(str(entry["path"]), task)]
        if not files:
            lacking.append(task)
        found += [_wanted(source, commit, endpoint, root, entry) for entry in files]
    if lacking:
        names = sorted({PurePosixPath(str(entry["path"])).relative_to(source.folder).parts[0] for entry in listed})
        raise UserError(
            f"{endpoint}/datasets/{source.repository} has no file of {', '.join(lacking)}; it has {', '.join(names)}."
        )
    return found


def _listed(address: str, patience: Patience) -> list[dict[str, Any]]:
    """All entries of a listing, which comes in pages."""
    entries: list[dict[str, Any]] = []
    for _ in range(PAGES):
        with reading(address, patience) as answer:
            link = str(answer.headers.get("Link", ""))
            entries += json.load(answer)
        if 'rel="next"' not in link:
            return entries
        address = link.partition("<")[2].partition(">")[0]
    raise UserError(f"{address} has more than {PAGES} pages; expected the files of one dataset.")


def _is_of(path: str, task: str) -> bool:
    """Whether a folder of the path, or the name of the file, is the task's."""
    *folders, name = PurePosixPath(path).parts
    return plain_name(task) in [plain_name(part) for part in (*folders, name.partition(".")[0])]


def _wanted(source: Instructions, commit: str, endpoint: str, root: Path, entry: dict[str, Any]) -> Wanted:
    path = PurePosixPath(str(entry["path"]))
    inside = path.relative_to(source.folder) if source.folder else path
    if inside.is_absolute() or ".." in inside.parts:
        raise UserError(f"{endpoint} names the file '{path}', which is outside its folder; use another endpoint.")
    stored = entry.get("lfs") or {}
    return Wanted(
        f"{endpoint}/datasets/{source.repository}/resolve/{commit}/{urllib.parse.quote(str(path))}",
        root / source.into / inside,
        stored.get("size") or entry.get("size"),
        stored.get("oid"),
        f"as {endpoint} lists it at commit {commit[:12]}",
    )
