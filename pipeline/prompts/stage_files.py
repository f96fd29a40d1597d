"""What a finished stage leaves in its folder: tensors by name, of its module, its router's state and of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.files.atomic import empty_folder, remove_folder
from pipeline.prompts.answer_head import head_of
from pipeline.prompts.parts.projector import PROJECTOR
from pipeline.prompts.pool import MEMORY, SHARED, STATE, PromptPool
from pipeline.prompts.routers import State
from pipeline.prompts.routers.kept_keys import KEPT
from pipeline.prompts.routers.mean import PROTOTYPE
from pipeline.runs.finished import finish_folder, read_finished
from pipeline.runs.layout import stage_folder, unfinished_folder

HEAD = "head."  # of a learned router; only the training of its own stage needs it


@dataclass(frozen=True)
class StageCheckpoint:
    """What a finished stage leaves behind: tensors by name, in float32 but for kept keys."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def start_stage_folder(run: Path, index: int, name: str) -> Path:
    """An empty folder for a stage that begins."""
    return empty_folder(unfinished_folder(run, index, name))


def stage_tensors(values: Mapping[str, Tensor], state: State) -> dict[str, Tensor]:
    """The content of a stage's file: the trainables, and what the router keeps of the task."""
    # Copies: safetensors refuses tensors that share memory, such as views of what a router computed at once.
    named = {name if name == PROTOTYPE else STATE + name: value.detach().clone() for name, value in state.items()}
    return {**values, **named}


def add_stage(pool: PromptPool, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Add what a stage's file holds to the pool; a head, which stages of all methods once had, is left out."""
    state = {key.removeprefix(STATE): value for key, value in tensors.items() if key.startswith((PROTOTYPE, STATE))}
    shared = {key: value for key, value in tensors.items() if key.startswith((PROJECTOR, SHARED))}
    others = (PROTOTYPE, STATE, PROJECTOR, SHARED, MEMORY, HEAD)
    pool.append(name, {key: value for key, value in tensors.items() if not key.startswith(others)}, state, shared)
    pool.memory = {key: value.detach().float().clone() for key, value in tensors.items() if key.startswith(MEMORY)}


def is_state(name: str) -> bool:
    """Whether a tensor of a stage's file belongs to what the router keeps of the task."""
    return name.startswith((PROTOTYPE, STATE))


def head_of_stage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a stage's file has of an answer head, by the names of a state."""
    return head_of({name.removeprefix(STATE): value for name, value in tensors.items() if name.startswith(STATE)})


def without_kept_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A stage's tensors without the sample of routing keys that its task keeps."""
    return {name: value for name, value in tensors.items() if not name.startswith(STATE + KEPT)}


def save_stage(
    run: Path,
    index: int,
    name: str,
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    replace: Callable[[Path], object] = remove_folder,
) -> Path:
    """Complete the unfinished folder of a stage and give it its final name; returns that folder.

    `replace` frees that name where a folder has it, see `finish_folder`.
    """
    work, final = unfinished_folder(run, index, name), stage_folder(run, index, name)
    kept = {key: value if key.startswith(STATE + KEPT) else value.float() for key, value in tensors.items()}
    return finish_folder(work, final, kept, {"task": name, "stage": index + 1, **meta}, replace)


def load_stage(run: Path, index: int, name: str) -> StageCheckpoint | None:
    """The checkpoint of a finished stage, None when the stage was not finished; UserError when it is damaged."""
    folder = stage_folder(run, index, name)
    fix = f"Remove the folder {folder} to train this stage and the following ones again, or restore it."
    found = read_finished(folder, fix)
    return None if found is None else StageCheckpoint(*found)
