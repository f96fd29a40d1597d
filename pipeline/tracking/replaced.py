"""The records of a stage in trackers when it is trained again or taken back: kept, and marked as replaced.

What MLflow's runs and models are is in run.json, which `MlflowTracker` reads when the run is continued: it begins a run
of its own for the new stage, and marks the former one once the new one is whole.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.files.atomic import write_json
from pipeline.runs.attempts import move
from pipeline.runs.layout import STATE
from pipeline.runs.state import read_state
from pipeline.tracking.tensorboard_tracker import FOLDER
from pipeline.tracking.wandb_tracker import RUNS

MLFLOW, STAGES, MODELS = "mlflow", "stages", "models"  # in run.json
REPLACED, RESTORED = "replaced", "restored"  # there: what `MlflowTracker` has to mark, and to mark no longer
KEPT = "tracking.json"  # in the folder of what was put aside: the ids of its run and its model
AT_ONCE = ""  # in place of a stage's label: marked when the run is continued, not when that stage is whole


def detach(run: Path, label: str, task: str, place: Path, at_once: bool, keep: bool = True) -> None:
    """Take a stage's records out of those that a continued run goes on with, and keep their ids in `place`.

    Args:
        run: the run folder, whose lock is held.
        label: the stage's, such as 03-Boxes.
        task: its name.
        place: where the rest of it is put aside.
        at_once: whether nothing takes its place, so that it is marked when the run is continued.
        keep: whether it may come back; without, the name of `place` alone is used.
    """
    state = read_state(run)
    ids = state.get(MLFLOW) or {}
    known = {"run": ids.get(STAGES, {}).pop(label, None), "model": ids.get(MODELS, {}).pop(task, None)}
    if known["run"] is not None:
        if keep:
            write_json(place / KEPT, known)
        ids.setdefault(REPLACED, {})[known["run"]] = {"label": AT_ONCE if at_once else label, "model": known["model"]}
        write_json(run / STATE, state)
    move(run / FOLDER / label, run / FOLDER / f"{label}.{place.name}")
    runs = _read(run / RUNS)
    if label in runs:
        runs[f"{label}.{place.name}"] = runs.pop(label)
        write_json(run / RUNS, runs)


def attach(run: Path, label: str, task: str, place: Path) -> None:
    """Undo `detach`: the records of what was put aside in `place` are the stage's again."""
    known, state = _read(place / KEPT), read_state(run)
    ids = state.get(MLFLOW) or {}
    if known and ids:
        newer = ids.setdefault(STAGES, {}).get(label)
        if newer is not None and newer != known["run"]:  # of an attempt that was not finished
            ids.setdefault(REPLACED, {})[newer] = {"label": AT_ONCE, "model": ids.get(MODELS, {}).pop(task, None)}
        ids[STAGES][label] = known["run"]
        if known["model"] is not None:
            ids.setdefault(MODELS, {})[task] = known["model"]
        if ids.get(REPLACED, {}).pop(known["run"], None) is None:
            ids.setdefault(RESTORED, {})[known["run"]] = {"label": AT_ONCE, "model": known["model"]}
        write_json(run / STATE, state)
    move(run / FOLDER / f"{label}.{place.name}", run / FOLDER / label)
    runs = _read(run / RUNS)
    if f"{label}.{place.name}" in runs:
        runs[label] = runs.pop(f"{label}.{place.name}")
        write_json(run / RUNS, runs)


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text("utf-8"))
        return content if isinstance(content, dict) else {}
    return {}
