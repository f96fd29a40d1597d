"""What a report lacks, and why: stages that were not trained, scores that were not measured, files that are gone."""

from __future__ import annotations

from pathlib import Path

from pipeline.files.paths import command
from pipeline.report.scores import points
from pipeline.runs.folder import RunFolder
from pipeline.runs.layout import COMPLETE, CONFIG, EVALUATIONS, MATRIX, STAGES, STATE

ENDED = {"failed": "ended with an error", "stopped": "was stopped", "running": "was still running"}


def missing(run: RunFolder) -> list[str]:
    """One sentence for each thing that the report of a whole run would show and that this run does not have."""
    return [*_files(run), *_stages(run), *_scores(run), *_data(run)]


def _files(run: RunFolder) -> list[str]:
    return [
        f"{name} is not in the run folder; {what}." for name, what in _FILES.items() if not (run.path / name).is_file()
    ]


_FILES = {
    STATE: "status, times and versions are unknown",
    CONFIG: "settings, model and data are unknown",
    MATRIX: "no scores were recorded yet",
}


def _stages(run: RunFolder) -> list[str]:
    if run.learned_nothing or run.method == "joint":
        return []
    folders = sorted((run.path / STAGES).glob("*/"))
    trained = [folder.name for folder in folders if (folder / COMPLETE).is_file()]
    begun = [folder.name for folder in folders if not (folder / COMPLETE).is_file()]
    found = []
    if len(trained) < len(run.set_names):
        ended = ENDED.get(str(run.state.get("status")))
        said = f"{len(trained)} of {len(run.set_names)} stages are trained" + (f"; the run {ended}" if ended else "")
        found.append(f"{said}. `{command('run', run.path / CONFIG)}` goes on with it.")
    found += [f"Stage {name.removesuffix('.unfinished')} has begun and is not finished." for name in begun]
    return found


def _scores(run: RunFolder) -> list[str]:
    found = []
    trained = len([folder for folder in (run.path / STAGES).glob("*/") if (folder / COMPLETE).is_file()])
    scored = (run.last_stage if run.last_stage is not None else -1) + 1
    if trained > scored and run.method != "joint":
        again = command("evaluate", run.path)
        found.append(f"{trained} stages are trained and {scored} scored; `{again}` measures the rest.")
    if run.zero_shot is None and run.config.get("evaluate", {}).get("zero_shot", True) is False:
        found.append("Zero-shot scores were not measured (evaluate.zero_shot is false), so there is no gain.")
    without = [
        task
        for task, last in zip(run.tasks, run.last_scores, strict=True)
        if last is not None and not points(run, task)
    ]
    if without:
        found.append(
            f"No interval for {', '.join(without)}: the predictions of the last score are not in {EVALUATIONS}/, or it "
            "is a score of a whole test set."
        )
    return found


def _data(run: RunFolder) -> list[str]:
    prepared = run.config.get("data", {}).get("prepared")
    if (
        not prepared
        or not run.last_predictions()
        or any((Path(prepared) / task / "test").is_dir() for task in run.tasks)
    ):
        return []
    return ["The prepared data is not on this machine, so the examples have no pictures."]
