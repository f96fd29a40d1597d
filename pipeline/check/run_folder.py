"""The check of the run folder: it has to belong to this recipe, base model and CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.backbones.base_model import base_fingerprint
from pipeline.config.recipe import Recipe
from pipeline.data.key_file import IDENTITY_FIELDS
from pipeline.errors import UserError
from pipeline.files.atomic import free_space
from pipeline.planning.model_files import ModelFiles
from pipeline.runs.claim import check_stage, claim_run, is_empty
from pipeline.runs.folder import read_run
from pipeline.runs.layout import COMPLETE, META, STAGES
from pipeline.runs.recorded import recorded_base_model

LEAST_FREE = 1 << 30  # bytes: the trainables of eight stages of a 7B model in float32, and some predictions


def check_run_folder(recipe: Recipe, model: ModelFiles | None, identity: dict[str, str] | None) -> str:
    """Check that the run folder is new, or a run of this recipe with this base model and CLIP."""
    path = recipe.run_path
    if not path.exists() or is_empty(path):
        return f"{path} (new, {_free(path)} free)"
    claim_run(recipe)  # writes nothing into an existing run
    status = str(read_run(path).state.get("status", "new"))
    expected: dict[str, Any] = {}
    if model is not None and model.loadable is not None:
        expected["base_model"] = base_fingerprint(recipe.model, recorded_base_model(path))
    if identity is not None:
        expected["clip"] = {field: identity[field] for field in IDENTITY_FIELDS}
    stages = sorted(found.parent for found in (path / STAGES).glob(f"*/{COMPLETE}"))
    for folder in stages:
        try:
            meta = json.loads((folder / META).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / META} cannot be read ({error}); remove {folder} to train it again.") from error
        check_stage(folder, meta, expected)
    same = " on this base model and CLIP" if len(expected) == 2 else ""
    return f"{path} ({status}, {len(stages)} stages trained{same}, {_free(path)} free)"


def _free(path: Path) -> str:
    """Free space where `path` is or will be; a run needs megabytes per stage, so only a full disk is an error."""
    free = free_space(path)
    if free < LEAST_FREE:
        raise UserError(
            f"run_dir: {free >> 20} MiB are free on the disk of '{path}'; make room or set run_dir elsewhere."
        )
    return f"{free / (1 << 30):.0f} GiB"
