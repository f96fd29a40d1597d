"""Whether a run folder, or a finished stage in it, belongs to the recipe that is to be run."""

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

# Fields that a run may be continued with when they differ: where and how fast it runs, not what it computes. Places of
# data and models are free because stages, answers and kept steps are compared with the fingerprints of what lies there.
FREE_FIELDS = (
    "run_dir",
    "data.prepared",
    "data.root",
    "model.path",
    "model.revision",
    "keys.path",
    "keys.revision",
    "data.workers",
    "data.shard_samples",
    "keys.batch",
    "train.log_every",
    "train.workers",
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
    """Refuse a finished stage that was trained on another model, CLIP or data than the run uses now."""
    for field, value in expected.items():
        if field in meta and meta[field] != value:
            raise UserError(
                f"{folder} was trained with another {field.replace('_', ' ')} "
                f"({_short(meta[field])}, now {_short(value)}). "
                "Put back what it was trained with, or start a new run (`--set run_dir=...`)."
            )


def claim_run(recipe: FileRecipe) -> Path:
    """Make the run folder, or check that it belongs to this recipe; the UserError lists the fields that differ.

    A folder in which nothing was begun (see `unbegun`) may be that of any recipe; it is left as it is here.
    """
    run = recipe.run_path
    path = run / CONFIG
    if path.is_file():
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not YAML ({error}); restore it or remove the run folder.") from error
        differing = differing_fields(_with_defaults(found, type(recipe)), recipe.model_dump(mode="json"))
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
    """Whether a folder can become a run's: what a process that writes config.yaml, or was killed then, has in it does
    not count."""
    return run.is_dir() and all(path.name.endswith(TEMPORARY_SUFFIX) for path in run.iterdir())


def unbegun(run: Path) -> bool:
    """Whether a run folder is that of starts which were all refused: it was locked, and nothing was written since.

    What such a refusal advises is mostly another value of a field, which must not be refused for the old one.
    """
    names = {path.name for path in run.iterdir() if not path.name.endswith(TEMPORARY_SUFFIX)}
    return {CONFIG, LOCK} <= names <= {CONFIG, LOCK, LENGTHS_FILE}


def _free_name(run: Path) -> Path:
    """A folder beside a run that is not there yet."""
    return next(free for number in count(2) if not (free := run.with_name(f"{run.name}-{number}")).exists())


def _with_defaults(found: Any, kind: type[FileRecipe]) -> Any:
    """A resolved recipe with what it meant by fields that did not exist when it was written."""
    try:
        return kind.model_validate(kind.as_a_run_meant(found)).model_dump(mode="json")
    except ValidationError:
        return found  # a field is gone or has other values now: the comparison will name it


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
    if prefix and _names(old) and _names(new):  # tasks, datasets: named item by item, for two long lists look alike
        if _names(old) != _names(new):
            return [(prefix, ", ".join(_names(old)), ", ".join(_names(new)))]
        pairs = zip(_names(old), old, new, strict=True)
        return [found for name, one, other in pairs for found in differing_fields(one, other, f"{prefix}.{name}")]
    return [] if old == new else [(prefix, old, new)]


def _names(items: Any) -> list[str]:
    """The names of a list of named things; empty for anything else."""
    named = isinstance(items, list) and all(isinstance(item, dict) and "name" in item for item in items)
    return [str(item["name"]) for item in items] if named else []


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."
