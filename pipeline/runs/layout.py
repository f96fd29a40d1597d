"""The layout of a run folder: names and paths of its files.

A run of a task sequence has `stages/NN-task/` and `eval/{zero-shot,after-NN,told-NN,ahead-NN,held-out-NN}/`, a
benchmark `units/NAME/`.
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
# There while what finished stages keep for routing is replaced: after a crash some is of one router, some of another.
REPLACING_ROUTING = ".routing-unfinished"
REPLACING_HEADS = ".heads-unfinished"  # the same of their answer heads
# Of a sequence: a further attempt at the last stage, an `undo` in progress, and what both have put aside.
ATTEMPT, UNDO, REPLACED = "attempt.json", "undo.json", "replaced"
SEARCHES = "searches"  # of a benchmark: searches that units take the lengths of their prompts from
ASK, ASK_FOLDER = "ask.csv", "ask"  # of a benchmark: what a person is asked to label, and pictures of it
UNFINISHED = ".unfinished"  # suffix of the folder of a stage or unit in training


def stage_folder(run: Path, index: int, name: str) -> Path:
    """Folder of a finished stage; `index` is 0-based."""
    return run / STAGES / f"{index + 1:02d}-{name}"


def unit_folder(run: Path, label: str) -> Path:
    """Folder of a finished unit of a benchmark."""
    return run / UNITS / label


def labels_file(run: Path, dataset: str) -> Path:
    """The labels that a person has given to a dataset's images in a benchmark."""
    return run / f"labels-{dataset}.csv"


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


def told_folder(run: Path, seen: int) -> Path:
    """Folder of the answers that would be others, were the task told, after the stage with which `seen` are learned."""
    return run / EVALUATIONS / f"told-{seen:02d}"


def ahead_folder(run: Path, number: int) -> Path:
    """Folder of the answers on the task with this number (from 1) just before its own stage."""
    return run / EVALUATIONS / f"ahead-{number:02d}"


def held_out_folder(run: Path, seen: int) -> Path:
    """Folder of the answers to the held-out samples of the newest of `seen` tasks, with the task told."""
    return run / EVALUATIONS / f"held-out-{seen:02d}"


def evaluations_of(seen: int) -> list[str]:
    """Names of the folders in `eval` whose answers depend on the stage with which `seen` tasks are learned."""
    run = Path()
    return [folder(run, seen).name for folder in (after_folder, told_folder, held_out_folder)]


def after_folders(run: Path) -> list[Path]:
    """Existing folders of answers after stages, the last stage first."""
    found = [path for path in (run / EVALUATIONS).glob("after-*") if path.name.removeprefix("after-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("after-")), reverse=True)
