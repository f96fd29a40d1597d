"""What a finished stage leaves in its folder: the learned tensors and the prototype, written and read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files.atomic import empty_folder
from pipeline.prompts.heads import ProjectionHead
from pipeline.runs.finished import finish_folder, read_finished
from pipeline.runs.layout import TENSORS, stage_folder, unfinished_folder


@dataclass(frozen=True)
class StageCheckpoint:
    """What a finished stage leaves behind; all tensors float32."""

    prompt: Tensor  # [L, D]
    prototype: Tensor  # [K]
    head: dict[str, Tensor]
    meta: dict[str, Any]
    projector: dict[str, Tensor]  # by its names in the projector; empty when it was not trained


def start_stage_folder(run: Path, index: int, name: str) -> Path:
    """An empty folder for a stage that begins."""
    return empty_folder(unfinished_folder(run, index, name))


def prototype_of(values: dict[str, Tensor]) -> Tensor:
    """The prototype [K] of a stage's final trainables, in float32 (docs/design.md 4.4)."""
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
