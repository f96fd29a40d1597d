"""The layout of a run folder: names and paths of its files.

A run of a task sequence has `stages/NN-task/` and `eval/{zero-shot,after-NN,ahead-NN}/`, a benchmark `units/NAME/`.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.config.yaml_file import CONFIG, STATE

__all__ = ["CONFIG", "STATE"]  # re-exported; defined where recipes are read, which recognises run folders by them

TENSORS, META, COMPLETE = "prompts.safetensors", "meta.json", "COMPLETE"  # of a finished stage or unit
LOCK = "LOCK"  # the file that the run's writer holds a lock on
LENGTHS_FILE = "lengths.json"  # numbers of samples that are too long, with the data and settings they hold for
MATRIX = "matrix.json"  # of a sequence: the accuracy matrix
RESULTS = "results.json"  # of a benchmark: the units' scores
REPORT = "report.html"
METRICS = "metrics.jsonl"  # of a stage or unit: the log of its training
RESUME = "resume"  # folder of a stage's checkpoints while it is trained (see `pipeline.training.resume`)
STAGES, UNITS, EVALUATIONS = "stages", "units", "eval"
UNFINISHED = ".unfinished"  # suffix of the folder of a stage or unit in training


def stage_folder(run: Path, index: int, name: str) -> Path:
    """Folder of a finished stage; `index` is 0-based."""
    return run / STAGES / f"{index + 1:02d}-{name}"


def unit_folder(run: Path, label: str) -> Path:
    """Folder of a finished unit of a benchmark."""
    return run / UNITS / label


def unfinished(folder: Path) -> Path:
    """Folder of a stage or unit in training; of an earlier attempt's folder only the checkpoints are used."""
    return folder.with_name(folder.name + UNFINISHED)


def unfinished_folder(run: Path, index: int, name: str) -> Path:
    """Folder of a stage while it is trained; `index` is 0-based."""
    return unfinished(stage_folder(run, index, name))


def label_of(folder: Path) -> str:
    """The name of a stage or unit from its folder, finished or in training: `01-colour`."""
    return folder.name.removesuffix(UNFINISHED)


def begun_stages(run: Path, number: int) -> list[Path]:
    """Folders of the stage with this number (from 1), finished or not."""
    return sorted((run / STAGES).glob(f"{number:02d}-*"))


def zero_shot_folder(run: Path) -> Path:
    """Folder of the frozen model's answers."""
    return run / EVALUATIONS / "zero-shot"


def after_folder(run: Path, seen: int) -> Path:
    """Folder of the answers after the stage with which `seen` tasks are learned."""
    return run / EVALUATIONS / f"after-{seen:02d}"


def ahead_folder(run: Path, number: int) -> Path:
    """Folder of the answers on the task with this number (from 1) just before its own stage."""
    return run / EVALUATIONS / f"ahead-{number:02d}"


def after_folders(run: Path) -> list[Path]:
    """Existing folders of answers after stages, the last stage first."""
    return sorted((run / EVALUATIONS).glob("after-*"), reverse=True)
