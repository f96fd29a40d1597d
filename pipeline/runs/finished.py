"""Checkpoints of finished training: a few MB, readable at any world size, whole or not there (design.md 6 and 7)."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.config.base import FileRecipe
from pipeline.errors import UserError
from pipeline.files.atomic import (
    NFS_OPEN,
    TEMPORARY_SUFFIX,
    empty_folder,
    remove_folder,
    replacing,
    sha256,
    sync_folder,
    write_synced,
)
from pipeline.prompts.heads import ProjectionHead

FORMAT_VERSION = 1
TENSORS, META, COMPLETE = "prompts.safetensors", "meta.json", "COMPLETE"
CONFIG, LOCK = "config.yaml", "LOCK"  # of a run folder: its resolved recipe; what its writer holds a lock on
LENGTHS_FILE = "lengths.json"  # of a run folder: what was decided about long samples, and of which data and settings
RESUME = "resume"  # folder of a stage's checkpoints while it is trained (see `pipeline.training.resume`)
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


@dataclass(frozen=True)
class StageCheckpoint:
    """What a finished stage leaves behind; all tensors float32."""

    prompt: Tensor  # [L, D]
    prototype: Tensor  # [K]
    head: dict[str, Tensor]
    meta: dict[str, Any]
    projector: dict[str, Tensor]  # by its names in the projector; empty when it was not trained


def stage_folder(run: Path, index: int, name: str) -> Path:
    """Folder of a finished stage; `index` is 0-based."""
    return run / "stages" / f"{index + 1:02d}-{name}"


def unfinished_folder(run: Path, index: int, name: str) -> Path:
    """Folder of a stage while it is trained; of an earlier attempt only its checkpoints are of use (see resume)."""
    return run / "stages" / f"{index + 1:02d}-{name}.unfinished"


def start_stage_folder(run: Path, index: int, name: str) -> Path:
    """An empty folder for a stage that begins."""
    return empty_folder(unfinished_folder(run, index, name))


def prototype_of(values: dict[str, Tensor]) -> Tensor:
    """The prototype [K] of a stage's final trainables, in float32 (modalprompt.md 3.4)."""
    fc1, fc2 = values["head.fc1.weight"], values["head.fc2.weight"]
    head = ProjectionHead(fc1.shape[1], fc2.shape[0])
    head.load_state_dict(_part(values, "head."))
    with torch.no_grad():
        return head(values["prompt"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def save_stage(run: Path, index: int, name: str, values: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Complete the unfinished folder of a stage and give it its final name; returns that folder."""
    work, final = unfinished_folder(run, index, name), stage_folder(run, index, name)
    tensors = {**values, "prototype": prototype_of(values)}
    return finish_folder(work, final, tensors, {"task": name, "stage": index + 1, **meta})


def finish_folder(work: Path, final: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Write what was learned and its description into `work` and give it the name `final`, whole or not there."""
    work.mkdir(parents=True, exist_ok=True)
    write_synced(work / TENSORS, save({key: value.float().contiguous() for key, value in tensors.items()}))
    meta = {"format": FORMAT_VERSION, **meta, "sha256": sha256(work / TENSORS)}
    (work / META).write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (work / COMPLETE).write_text(sha256(work / META) + "\n")
    for path in work.iterdir():
        if path.is_file() and not path.name.startswith(NFS_OPEN):  # it goes when whoever has it open closes it
            with path.open("rb") as file:
                os.fsync(file.fileno())  # the name must not survive a power cut that the content did not
    sync_folder(work)
    if final.exists():  # a damaged or incomplete one that was refused
        remove_folder(final)
    work.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(final / RESUME, ignore_errors=True)  # last: until the folder has its name they are what there is
    return final


def load_stage(run: Path, index: int, name: str) -> StageCheckpoint | None:
    """The checkpoint of a finished stage, None when the stage was not finished; UserError when it is damaged."""
    folder = stage_folder(run, index, name)
    fix = f"Remove the folder {folder} to train this stage and the following ones again, or restore it."
    found = read_finished(folder, fix)
    if found is None:
        return None
    tensors, meta = found
    try:
        head, projector = _part(tensors, "head."), _part(tensors, "projector.")
        return StageCheckpoint(tensors["prompt"], tensors["prototype"], head, meta, projector)
    except KeyError as error:
        raise UserError(f"{folder / TENSORS} lacks a tensor or cannot be read ({error}). {fix}") from error


def read_finished(folder: Path, fix: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `finish_folder` wrote, None when the folder was not finished; UserError, ending in `fix`, when damaged."""
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


def read_state(run: Path) -> dict[str, Any]:
    """What an earlier attempt left in a run's run.json; empty when there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((run / "run.json").read_text("utf-8"))
    return {}


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."
