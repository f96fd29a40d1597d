"""Checks that a run folder, and the finished stages in it, belong to the recipe that is run."""

from __future__ import annotations

import json
import shlex
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.base import FileRecipe
from pipeline.errors import UserError
from pipeline.files.atomic import TEMPORARY_SUFFIX
from pipeline.runs.layout import CONFIG, LENGTHS_FILE, LOCK

# Fields that may differ when a run is continued: they decide where and how fast it runs, not what it computes. Paths of
# data and models are among them because fingerprints of their content are compared with those in stages and answers.
FREE_FIELDS = (
    "run_dir",
    "data.prepared",
    "data.root",
    "data.prepare_first",
    "model.path",
    "model.revision",
    "keys.path",
    "keys.revision",
    "data.workers",
    "data.shard_samples",
    "keys.batch",
    "train.log_every",
    "train.workers",
    "train.copy_ahead",
    "train.micro_batch",
    "train.deepspeed",
    "train.processes",
    "train.save_minutes",
    "train.save_steps",
    "train.keep",
    "train.watchdog_s",
    "train.checkpointing",
    "evaluate",
    "evaluate_batch",
    "tracking",
)


def check_stage(folder: Path, meta: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise UserError for a finished stage that was trained with another model, CLIP or data than `expected`."""
    for field, value in expected.items():
        if field in meta and meta[field] != value:
            raise UserError(
                f"{folder} was trained with another {field.replace('_', ' ')} "
                f"({_short(meta[field])}, now {_short(value)}). "
                "Put back what it was trained with, or start a new run (`--set run_dir=...`)."
            )


def claim_run(recipe: FileRecipe) -> Path:
    """Make the run folder, or check that it belongs to this recipe; the UserError lists the fields that differ.

    A folder in which nothing was started (see `unbegun`) is accepted whatever its recipe, and not changed here.
    """
    run = recipe.run_path
    path = run / CONFIG
    if path.is_file():
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not YAML ({error}); restore it or remove the run folder.") from error
        now = recipe.continuing(found).model_dump(mode="json")
        fields = differing_fields(_with_defaults(found, type(recipe)), now)
        differing = [field for field in fields if not _within(field[0], recipe.adopted)]
        if differing and not unbegun(run):
            listed = "; ".join(f"{name}: {_short(old)} there, {_short(new)} now" for name, old, new in differing)
            raise UserError(
                f"The run folder {run} belongs to another recipe ({listed}). Set run_dir to a new folder "
                f"(`--set {shlex.quote(f'run_dir={_free_name(run)}')}`), or go back to the values there to continue it."
            )
        return run
    if run.exists() and not is_empty(run):
        raise UserError(f"{run} exists and is not a run (no config.yaml). Set run_dir to a new or empty folder.")
    run.mkdir(parents=True, exist_ok=True)
    recipe.dump_yaml(path)
    return run


def is_empty(run: Path) -> bool:
    """Whether a folder is empty but for temporaries, which a process leaves there that was killed at config.yaml."""
    return run.is_dir() and all(path.name.endswith(TEMPORARY_SUFFIX) for path in run.iterdir())


def unbegun(run: Path) -> bool:
    """Whether every start in a run folder was refused before anything was written but its recipe and its lock.

    The message of such a refusal mostly advises to change a field, so the changed recipe must be accepted.
    """
    names = {path.name for path in run.iterdir() if not path.name.endswith(TEMPORARY_SUFFIX)}
    return {CONFIG, LOCK} <= names <= {CONFIG, LOCK, LENGTHS_FILE}


def _free_name(run: Path) -> Path:
    """A folder beside a run that does not exist yet."""
    return next(free for number in count(2) if not (free := run.with_name(f"{run.name}-{number}")).exists())


def _with_defaults(found: Any, kind: type[FileRecipe]) -> Any:
    """A resolved recipe, completed with the values of fields that did not exist when it was written."""
    try:
        return kind.model_validate(kind.as_a_run_meant(found)).model_dump(mode="json")
    except ValidationError:
        return found  # a field no longer exists or has other values; the comparison names it


def differing_fields(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(field, old value, new value) of every field that changes what a run computes."""
    if prefix in FREE_FIELDS:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for key in dict.fromkeys([*old, *new])
            for difference in differing_fields(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
        ]
    if prefix and _names(old) and _names(new):  # tasks, datasets: compared item by item, for a short message
        if _names(old) != _names(new):
            return [(prefix, ", ".join(_names(old)), ", ".join(_names(new)))]
        pairs = zip(_names(old), old, new, strict=True)
        return [found for name, one, other in pairs for found in differing_fields(one, other, f"{prefix}.{name}")]
    return [] if old == new else [(prefix, old, new)]


def _within(field: str, groups: tuple[str, ...]) -> bool:
    """Whether a field is one of these or inside one."""
    return any(field == group or field.startswith(f"{group}.") for group in groups)


def _names(items: Any) -> list[str]:
    """The names in a list of mappings with `name`; empty for anything else."""
    named = isinstance(items, list) and all(isinstance(item, dict) and "name" in item for item in items)
    return [str(item["name"]) for item in items] if named else []


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."
