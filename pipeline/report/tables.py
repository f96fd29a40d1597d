"""Tables of runs as rows: comparison, means over seeds, continual metrics, and costs of stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pipeline.runs.contents import StageMeta, read_json
from pipeline.runs.folder import RunFolder, Scores
from pipeline.runs.layout import COMPLETE, META, STAGES

# How the names of a stage's tensors begin that are no trainables, and that no answer needs.
STATES, TRAINING_ONLY = ("prototype", "router."), ("head.", "memory.", "projector.")

METRIC_TEXTS = {
    "last": "mean over the tasks after the last stage",
    "average": "mean over the stages of the mean over the tasks seen; CoIN's and MCITlib's MAA",
    "immediate": "mean score of each task right after its own stage",
    "forgetting": "best earlier score minus the last one, mean over the earlier tasks; positive = forgotten",
    "backward_transfer": "last score minus own stage's; negative = forgotten; CoIN's “BWT” is minus this",
    "retention": "last score in percent of that right after learning, mean over the earlier tasks; 100 = nothing lost",
    "zero_shot": "mean score of the frozen model",
    "gain": "last minus zero_shot",
    "immediate_gain": "own stage's score minus zero-shot's, mean over the tasks",
    "told": "mean over the tasks after the last stage had each sample's task been told",
    "routing_loss": "told minus last: what routing costs",
    "forward_transfer": "score just before the own stage minus zero-shot's (measured with evaluate.ahead)",
}


def comparison_header(tasks: Sequence[str]) -> list[str]:
    """Return the titles of the numbers in `comparison_rows`."""
    return [*tasks, "last", "forgetting", "routing"]


def comparison_rows(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Return name, note and numbers per row: the scores on the first run's tasks, mean, forgetting, routing.

    Each task's most frequent answer and the frozen model come first.
    """
    tasks = runs[0].tasks
    rows = []
    blind = next((run for run in runs if run.majority is not None), None)
    if blind is not None and blind.majority is not None:
        scores = _by_task(blind, blind.majority, tasks)
        rows.append({"name": "majority answer", "note": "", "values": [*scores, _mean(scores), None, None]})
    frozen = next((run for run in runs if run.zero_shot is not None), None)
    if frozen is not None and frozen.zero_shot is not None:
        scores = _by_task(frozen, frozen.zero_shot, tasks)
        rows.append({"name": "zero-shot", "note": "", "values": [*scores, _mean(scores), None, None]})
    for run in runs:
        if run.learned_nothing and run.last_stage is None and frozen is not None:
            continue  # the zero-shot row has its scores
        rows.append({"name": run.name, "note": _note(run, tasks), "values": _run_values(run, tasks)})
    return rows


def _note(run: RunFolder, tasks: Sequence[str]) -> str:
    """What a run's row cannot be compared for: stages that are missing, and key figures of other tasks than `tasks`."""
    stage = run.last_stage
    if stage is None:
        return "nothing scored yet"
    notes = [f"{stage + 1} of {len(run.tasks)} stages"] if stage + 1 < len(run.tasks) else []
    if set(run.tasks) != set(tasks):
        notes.append(f"last, forgetting and routing of its own tasks: {', '.join(run.tasks)}")
    return "; ".join(notes)


def _run_values(run: RunFolder, tasks: Sequence[str]) -> Scores:
    metrics = run.metrics()
    values = [*_by_task(run, run.last_scores, tasks), metrics.get("last"), metrics.get("forgetting")]
    return [*values, known_mean(run.routing.get("accuracy"))]


def seed_rows(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Return name, seeds and (mean, standard deviation) per column of `comparison_header`, for runs that differ only
    in their seed.

    Recipes with a single run are left out; the deviation is that of a sample (n - 1).
    """
    groups: dict[tuple[str, str], list[RunFolder]] = {}
    for run in runs:
        if run.last_stage is not None and run.last_stage + 1 == len(run.tasks):
            recipe = str(run.state.get("recipe") or run.config.get("name"))
            groups.setdefault((recipe, run.method), []).append(run)
    rows = []
    for (recipe, method), members in groups.items():
        seeds = [str(run.config.get("seed", run.state.get("seed", "?"))) for run in members]
        if len(set(seeds)) < 2 or len(set(seeds)) < len(seeds):
            continue
        own = [_run_values(run, runs[0].tasks) for run in members]
        columns = [[value for value in column if value is not None] for column in zip(*own, strict=True)]
        values = [(mean(column), stdev(column)) if len(column) == len(members) else None for column in columns]
        rows.append({"name": f"{recipe}, {method}", "seeds": ", ".join(seeds), "values": values})
    return rows


def metric_rows(runs: Sequence[RunFolder]) -> list[tuple[str, str, Scores]]:
    """Return (name, description, one value per run) of every continual metric that some run has."""
    found = [run.metrics() for run in runs]
    rows = [(name, text, [metrics.get(name) for metrics in found]) for name, text in METRIC_TEXTS.items()]
    always = ("last", "average", "immediate", "forgetting", "backward_transfer")
    return [row for row in rows if row[0] in always or any(value is not None for value in row[2])]


def cost_rows(run: RunFolder) -> list[dict[str, Any]]:
    """Return the cost of each finished stage: steps, seconds, samples/s, ranks, last loss, and sizes.

    `trained` is the number of trainable parameters, `kept` the number of parameters that answering needs (the module
    and the router's state), `operations` those of training per sample, `megabytes` the size of the stage's file.
    Unknown values are None.
    """
    curves = run.losses()
    rows = []
    for folder in sorted((run.path / STAGES).glob("*/")):
        if not (folder / COMPLETE).is_file():
            continue
        meta = read_json(folder / META, StageMeta)
        # The first line covers the first step, which includes one-time work.
        speeds = [line["samples_per_s"] for line in curves.get(folder.name, [])[1:] if "samples_per_s" in line]
        counted, kept = _numbers(folder / "prompts.safetensors")
        file = folder / "prompts.safetensors"
        rows.append(
            {
                "stage": folder.name,
                "steps": meta.get("steps"),
                "seconds": meta.get("seconds"),
                "samples_per_s": mean(speeds) if speeds else None,
                "ranks": meta.get("world_size"),
                "loss": meta.get("loss"),
                "trained": meta.get("trained_parameters", counted),
                "operations": meta.get("operations_per_sample"),
                "kept": kept,
                "megabytes": file.stat().st_size / 1e6 if file.is_file() else None,
            }
        )
    return rows


def _numbers(file: Path) -> tuple[int | None, int | None]:
    """(number of trained parameters, number of parameters that answering needs) of a stage's file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="numpy") as tensors:
            sizes = {}
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                sizes[name] = size
    except (OSError, SafetensorError):
        return None, None
    trained = sum(size for name, size in sizes.items() if not name.startswith(STATES))
    return trained, sum(size for name, size in sizes.items() if not name.startswith(TRAINING_ONLY))


def _by_task(run: RunFolder, scores: Scores, tasks: Sequence[str]) -> Scores:
    """A run's scores in the order of these tasks, which may be another run's."""
    known = dict(zip(run.tasks, scores, strict=True))
    return [known.get(task) for task in tasks]


def _mean(scores: Scores) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None


def known_mean(scores: Scores | None) -> float | None:
    """Mean over the tasks that have a score; tasks of later stages have none yet."""
    return _mean([score for score in scores or [] if score is not None])
