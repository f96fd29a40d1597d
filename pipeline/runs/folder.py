"""Reads a run folder, finished or in progress; the layout is in pipeline/runs/layout.py."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.files.strict_text import load_yaml
from pipeline.metrics.continual import after_stage, routing_costs, square, summarise
from pipeline.runs.contents import (
    ConfigFile,
    Content,
    LogLine,
    MatrixFile,
    PredictionLine,
    Routing,
    Scores,
    StateFile,
    read_json,
    require,
)
from pipeline.runs.layout import (
    CONFIG,
    MATRIX,
    METRICS,
    STAGES,
    STATE,
    after_folder,
    after_folders,
    told_folder,
    zero_shot_folder,
)


@dataclass(frozen=True)
class RunFolder:
    """A run, finished or in progress; scores are in percent, None where nothing was evaluated."""

    path: Path
    config: dict[str, Any]
    state: dict[str, Any]
    tasks: list[str]
    accuracy: list[Scores]  # [T, T]
    zero_shot: Scores | None  # [T]
    routing: dict[str, Scores] = field(default_factory=dict)  # accuracy, image_only, text_only: [T] each
    majority: Scores | None = None  # [T] each task's most frequent training answer
    ahead: Scores | None = None  # [T] scores just before a task's own stage, where measured
    told: list[Scores | None] = field(default_factory=list)  # like `accuracy`, with the task told; None: not measured
    confusion: dict[str, dict[str, float]] = field(default_factory=dict)  # own task -> set ranked first -> percent
    format_free: dict[str, Any] = field(default_factory=dict)  # accuracy [T, T], zero_shot [T]; {} where not measured
    costs: dict[str, float | None] = field(default_factory=dict)  # by name, see `pipeline.sequence.costs`

    @property
    def name(self) -> str:
        """The folder's name, which identifies the run in tables."""
        return self.path.resolve().name

    @property
    def method(self) -> str:
        """The method's name; "?" when the folder's files do not have it."""
        return str(self.state.get("method") or self.config.get("method", {}).get("name") or "?")

    @property
    def learned_nothing(self) -> bool:
        """Whether the run is finished and has no stages, as with the zero-shot method."""
        return self.state.get("stages") == []

    @property
    def changes_earlier(self) -> str:
        """What a stage changes of earlier tasks: modules, answers or nothing; "" for a run that has no entry of it."""
        return str(self.state.get("changes_earlier") or "")

    @property
    def set_names(self) -> list[str]:
        """The prompt sets in the order in which they were learned; joint training has one for all tasks."""
        stages = self.state.get("stages")
        return [str(stage) for stage in stages] if isinstance(stages, list) and stages else self.tasks

    @property
    def last_stage(self) -> int | None:
        """The last stage (0-based) after which every task seen so far was scored, None when there is none."""
        complete = [t for t, row in enumerate(self.accuracy) if None not in row[: t + 1]]
        return complete[-1] if complete else None

    @property
    def last_scores(self) -> Scores:
        """The scores per task [T] after the last stage; the zero-shot scores of a run that trains nothing."""
        if self.last_stage is not None:
            return self.accuracy[self.last_stage]
        if self.learned_nothing and self.zero_shot is not None:
            return self.zero_shot
        return [None] * len(self.tasks)

    @property
    def told_scores(self) -> Scores | None:
        """The scores [T] after the last stage had the task been told; None where they were not measured."""
        stage = self.last_stage
        return None if stage is None or stage >= len(self.told) else self.told[stage]

    @property
    def format_free_scores(self) -> Scores | None:
        """The scores [T] after the last stage without the format of the answers; None where they are not known."""
        stage, rows = self.last_stage, self.format_free.get("accuracy") or []
        if stage is not None:
            return rows[stage] if stage < len(rows) else None
        return self.format_free.get("zero_shot") if self.learned_nothing else None

    def metrics(self) -> dict[str, float | None]:
        """Return the metrics of continual learning after the last stage so far."""
        if self.last_stage is None:
            return {}
        seen = self.last_stage + 1
        known = {
            name: row[:seen] if row and None not in row[:seen] else None
            for name, row in (("zero_shot", self.zero_shot), ("ahead", self.ahead and [0.0, *self.ahead[1:]]))
        }
        summary = summarise([row[:seen] for row in self.accuracy[:seen]], **known)
        told = self.told_scores
        return summary if told is None else {**summary, **routing_costs(told[:seen], self.last_scores[:seen])}

    def seen_means(self) -> Scores:
        """Return, per stage [T], the mean score over the tasks seen so far."""
        return [
            after_stage(self.accuracy, stage)["last"] if None not in row[: stage + 1] else None
            for stage, row in enumerate(self.accuracy)
        ]

    def losses(self) -> dict[str, list[dict[str, float]]]:
        """Return the log lines of each stage by the stage folder's name, in step order, every step once.

        Raises UserError for a line that is damaged.
        """
        curves = {}
        for file in sorted((self.path / STAGES).glob(f"*/{METRICS}")):
            # An interrupted stage repeats steps after it resumed, so a step may have two lines; the later one is valid.
            lines = {line["step"]: line for line in read_lines(file, LogLine)}
            if lines:
                curves[file.parent.name] = [lines[step] for step in sorted(lines)]
        return curves

    def last_predictions(self) -> dict[str, list[dict[str, Any]]]:
        """Return the prediction lines per task of the last evaluation that wrote any (zero-shot if nothing else).

        Raises UserError for a line that is damaged.
        """
        return self._last_evaluation[1]

    def told_predictions(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the prediction lines by sample id that differ from those of `last_predictions` with the task told.

        Of the tasks whose score with the task told is known. Raises UserError for a line that is damaged.
        """
        stage, scores = self.last_stage, self.told_scores
        if stage is None or scores is None or self._last_evaluation[0] != after_folder(self.path, stage + 1):
            return {}
        folder = told_folder(self.path, stage + 1)
        tasks = [task for task, score in zip(self.tasks, scores, strict=True) if score is not None]
        found = {task: read_lines(folder / f"{task}.jsonl", PredictionLine) for task in tasks}
        return {task: {str(line.get("id")): line for line in lines} for task, lines in found.items()}

    @functools.cached_property
    def _last_evaluation(self) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
        """The folder of the last evaluation that wrote predictions, and these; read once, because they may be many."""
        for folder in [*after_folders(self.path), zero_shot_folder(self.path)]:
            found = {task: list(read_lines(folder / f"{task}.jsonl", PredictionLine)) for task in self.tasks}
            found = {task: lines for task, lines in found.items() if lines}
            if found:
                return folder, found
        return self.path, {}


def read_run(path: Path) -> RunFolder:
    """Read a run folder; raises UserError when it is missing, is no run, or a file in it is damaged."""
    if path.is_file():
        raise UserError(f"{path} is a file; expected the folder of a run, which `python -m pipeline run` wrote.")
    if not path.is_dir():
        raise UserError(f"The run folder {path} does not exist; expected one that `python -m pipeline run` wrote.")
    if not any((path / file).is_file() for file in (STATE, CONFIG, MATRIX)):
        raise UserError(
            f"{path} is not a run: it has no run.json, config.yaml or matrix.json. Name a folder that "
            "`python -m pipeline run` wrote (by default under runs/)."
        )
    config = read_config(path / CONFIG)
    matrix = read_json(path / MATRIX, MatrixFile)
    routing = matrix.get("routing") or {}
    require(routing, Routing, f"routing in {path / MATRIX}")
    try:
        tasks = [str(task) for task in matrix.get("tasks") or [t["name"] for t in config["data"]["tasks"]]]
    except (KeyError, TypeError):
        raise UserError(
            f"{path} does not say which tasks it has; expected them in matrix.json or config.yaml."
        ) from None
    try:
        accuracy = square(matrix.get("accuracy") or [[None] * len(tasks)])
    except UserError as error:
        raise UserError(f"{path / MATRIX}: {error}") from None
    zero_shot, majority, ahead = (matrix.get(name) or None for name in ("zero_shot", "majority", "ahead"))
    confusion = routing.get("confusion") or {}
    routing = {name: routing[name] for name in Routing.model_fields if name != "confusion" and routing.get(name)}
    told = matrix.get("told") or []
    rows = {"zero_shot": zero_shot, "majority": majority, "ahead": ahead, "accuracy": accuracy[0], **routing}
    rows |= {f"told.{number}": row for number, row in enumerate(told)}
    free = matrix.get("format_free") or {}
    rows |= {f"format_free.{number}": row for number, row in enumerate(free.get("accuracy") or [])}
    rows["format_free.zero_shot"] = free.get("zero_shot")
    for name, scores in rows.items():
        if scores is not None and len(scores) != len(tasks):
            raise UserError(
                f"{path / MATRIX} has {len(scores)} scores in {name}; expected {len(tasks)}, one per task. "
                "Evaluate the run again."
            )
    state = read_json(path / STATE, StateFile)
    timing = state.get("timing")
    seconds = timing.get("evaluate_s") if isinstance(timing, dict) else None
    costs = {**(matrix.get("costs") or {}), "seconds_evaluation": seconds}
    return RunFolder(
        path, config, state, tasks, accuracy, zero_shot, routing, majority, ahead, told, confusion, free, costs
    )


def read_lines(path: Path, kind: type[Content]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a .jsonl file; none when it is missing, and none for a line still being written.

    Raises UserError for an object that is not of the kind.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                require(record, kind, f"{path}, line {number}")
                yield record


def read_config(path: Path) -> dict[str, Any]:
    """The content of a run's config.yaml, {} where there is no such file; UserError when it is damaged."""
    if not path.is_file():
        return {}
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML ({str(error).splitlines()[0]}); restore the file.") from None
    except UserError as error:
        raise UserError(f"{path}: {error}.") from None
    if not isinstance(content, dict):
        return {}
    require(content, ConfigFile, str(path))
    return content
