"""The provenance of a run: commit, package versions, Slurm job, fingerprints of its data."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "deepspeed", "webdataset", "safetensors", "numpy")
DISTRIBUTION = "continual-prompts"
SLURM_VARIABLES = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_NNODES", "SLURM_NTASKS")
DIFF_LIMIT = 1_000_000  # characters; larger differences are not stored, as nobody would read them
GIT_TIMEOUT_S = 10
_REPOSITORY = Path(__file__).resolve().parents[2]


def describe(prepared: Path, tasks: Sequence[str]) -> dict[str, str]:
    """Return the provenance by name: commit, package versions, Slurm ids, fingerprints of the prepared data."""
    versions = {"python": platform.python_version()} | package_versions()
    with contextlib.suppress(metadata.PackageNotFoundError):  # a checkout that is not installed has a commit instead
        versions[DISTRIBUTION] = metadata.version(DISTRIBUTION)
    facts = {f"version.{name}": version for name, version in versions.items()}
    commit = _git("rev-parse", "HEAD")
    if commit:
        facts["mlflow.source.git.commit"] = commit.strip()
    facts |= {name.lower(): os.environ[name] for name in SLURM_VARIABLES if name in os.environ}
    for task in tasks:
        for split in ("train", "test"):
            fingerprint = dataset_fingerprint(prepared / task / split)
            if fingerprint:
                facts[f"data.{task}.{split}"] = fingerprint
    return facts


@functools.cache
def code() -> dict[str, Any]:
    """The code's `commit`, and `uncommitted`, whether it was changed since; {} outside of a checkout of the project.

    As it was when it was first asked: the modules of a process do not change with the files.
    """
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit.strip(), "uncommitted": bool(changes)} if commit else {}


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages on which results may depend, by package."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def dataset_fingerprint(folder: Path) -> str | None:
    """Return the fingerprint in the folder's dataset.json, or None when the split is not prepared or not readable."""
    try:
        fingerprint = json.loads((folder / "dataset.json").read_text(encoding="utf-8")).get("fingerprint")
    except (OSError, ValueError, AttributeError):
        return None
    return str(fingerprint) if fingerprint else None


def uncommitted_changes() -> str | None:
    """Return the project's `git diff HEAD`, or None when it is empty or longer than DIFF_LIMIT."""
    difference = _git("diff", "HEAD")
    return difference if difference and len(difference) <= DIFF_LIMIT else None


def _git(*arguments: str) -> str | None:
    if not (_REPOSITORY / ".git").exists():  # an installed package may lie in another project's repository
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(_REPOSITORY), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout
