"""Predictions to page through: which there are, filters on them, and what a page says of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import nearest
from pipeline.report.predictions import RIGHT, routes
from pipeline.runs.folder import RunFolder
from pipeline.runs.layout import after_folders, zero_shot_folder
from pipeline.ui.predictions import NONE, Index, Predictions, Rows
from pipeline.ui.web import PageError

PER_PAGE = 10
MOST_SETS = 6  # similarities that an example shows, besides those of the inserted sets
SHOWN = {
    "all": "all",
    "wrong": "wrong answers",
    "right": "right answers",
    "misrouted": "misrouted: another task's set ranks first",
    "unfamiliar": "called unfamiliar",
}


@dataclass(frozen=True)
class Wanted:
    """The filters of a page of examples; "" stands for the last stage, for all tasks, for every set and every text."""

    stage: str = ""
    task: str = ""
    show: str = "all"
    first: str = ""  # the set that ranks first
    text: str = ""
    page: int = 1

    @classmethod
    def of(cls, given: Any) -> Wanted:
        """The filters in an address's query; PageError for a page that is no number."""
        page = str(given.get("page", "1"))
        if not (page.isascii() and page.isdigit() and int(page[:12]) > 0):
            raise PageError(f"page is '{page[:20]}'; expected a whole number from 1.", 400)
        texts = {name: str(given.get(name, "")) for name in ("stage", "task", "first", "text")}
        return cls(**texts, show=str(given.get("show") or "all"), page=int(page[:12]))

    def fields(self) -> dict[str, Any]:
        """The parameters of an address that asks for the same, without those that ask for nothing."""
        page = self.page if self.page > 1 else ""
        show = self.show if self.show != "all" else ""
        found = {"stage": self.stage, "task": self.task, "show": show, "first": self.first, "text": self.text}
        return {name: value for name, value in {**found, "page": page}.items() if value != ""}


@dataclass(frozen=True)
class Found:
    """A page of the predictions that are wanted."""

    total: int
    pages: int
    items: list[dict[str, Any]]
    damaged: int  # lines that cannot be read


class Evaluation:
    """The predictions of one evaluation of a run; `stage` is the name of its folder, "" the last one."""

    def __init__(self, run: RunFolder, predictions: Predictions, stage: str = "") -> None:
        self.run, self._predictions = run, predictions
        self.stages = stages_of(run)
        if stage and stage not in self.stages:
            known = ", ".join(self.stages) or "none yet"
            raise PageError(f"there is no evaluation '{stage}' of {run.name}; expected one of: {known}.")
        self.stage = stage or next(reversed(self.stages), "")
        self.routes = routes(run)
        self.sets = run.set_names

    def file(self, task: str) -> Path | None:
        """The file of a task's predictions; None where there is none, or where it lies outside of the run's folder."""
        path = self.run.path / "eval" / self.stage / f"{task}.jsonl"
        inside = path.resolve().is_relative_to(self.run.path.resolve())
        return path if self.stage and inside and path.is_file() else None

    @property
    def tasks(self) -> list[str]:
        """The tasks with predictions."""
        return [task for task in self.run.tasks if self.file(task) is not None]

    def index(self, task: str) -> Index:
        """The index of a task's predictions; PageError for a task without any."""
        path = self.file(task) if task in self.run.tasks else None
        if path is None:
            known = ", ".join(self.tasks) or "none"
            raise PageError(
                f"there are no predictions of the task '{task}'; expected one of: {known}.{nearest(task, self.tasks)}"
            )
        return self._predictions.index(path)

    def confusion(self) -> dict[str, dict[str, float]]:
        """Own task -> set that ranks first -> percent of the task's samples; {} for methods without a router."""
        shares: dict[str, dict[str, float]] = {}
        for task in self.tasks if self.routes else []:
            first = self.index(task).first
            numbers, counts = np.unique(first[(first != NONE) & (first < len(self.sets))], return_counts=True)
            found = {self.sets[n]: 100.0 * int(c) / len(first) for n, c in zip(numbers, counts, strict=True)}
            if found:
                shares[task] = found
        return shares

    def find(self, wanted: Wanted) -> Found:
        """The page of examples; PageError for an unknown filter or task, Unready while the predictions are read."""
        if wanted.show not in SHOWN:
            raise PageError(f"show is '{wanted.show}'; expected one of: {', '.join(SHOWN)}.", 400)
        if wanted.first and wanted.first not in self.sets:
            raise PageError(f"there is no set '{wanted.first}'; expected one of: {', '.join(self.sets)}.")
        tasks = [wanted.task] if wanted.task else self.tasks
        indexes = {task: self.index(task) for task in tasks}
        rows = {task: self._rows(task, index, wanted) for task, index in indexes.items()}
        total = sum(map(len, rows.values()))
        start, items = (wanted.page - 1) * PER_PAGE, list[dict[str, Any]]()
        for task, places in rows.items():
            part = places[max(0, start) : max(0, start + PER_PAGE - len(items))].tolist() if start < len(places) else []
            items += [
                self._item(task, row, line) for row, line in zip(part, indexes[task].lines(part), strict=True) if line
            ]
            start = max(0, start - len(places))
            if len(items) >= PER_PAGE:
                break
        damaged = sum(index.damaged for index in indexes.values())
        return Found(total, max(1, -(-total // PER_PAGE)), items, damaged)

    def item(self, task: str, row: int) -> dict[str, Any]:
        """One prediction by its place; PageError where there is none."""
        index = self.index(task)
        line = index.lines([row])[0] if 0 <= row < len(index) else {}
        if not line:
            raise PageError(f"there is no prediction {row} of {task}; expected 0 to {len(index) - 1}.")
        return self._item(task, row, line)

    def _rows(self, task: str, index: Index, wanted: Wanted) -> Rows:
        kept = np.ones(len(index), np.bool_)
        if wanted.show == "right":
            kept = index.scores >= RIGHT
        elif wanted.show == "wrong":
            kept = ~(index.scores >= RIGHT)
        elif wanted.show == "unfamiliar":
            kept = index.unfamiliar
        elif wanted.show == "misrouted":
            own = self.sets.index(task) if self.routes and task in self.sets else NONE
            kept = (index.first != NONE) & (index.first != own) if own != NONE else np.zeros(len(index), np.bool_)
        if wanted.first:
            kept = kept & (index.first == self.sets.index(wanted.first))
        rows = np.flatnonzero(kept)
        if not wanted.text:
            return rows
        return np.intersect1d(rows, self._predictions.matching(index, wanted.text), assume_unique=True)

    def _item(self, task: str, row: int, line: dict[str, Any]) -> dict[str, Any]:
        selected = [str(name) for name in line.get("selected") or []]
        score = line.get("score")
        known = score if isinstance(score, int | float) else None
        sets = self._sets(line, selected)
        first = next((one["name"] for one in sets if one["first"]), "")
        return {
            "task": task,
            "row": row,
            "id": str(line.get("id", "")),
            "question": str(line.get("question", "")),
            "answer": str(line.get("answer", "")),
            "prediction": str(line.get("prediction", "")),
            "score": known,
            "right": known is not None and known >= RIGHT,
            "misrouted": self.routes and task in self.sets and first not in ("", task),
            "unfamiliar": line.get("unfamiliar") is True,
            "sets": sets,
        }

    def _sets(self, line: dict[str, Any], selected: Sequence[str]) -> list[dict[str, Any]]:
        """The inserted sets and the most similar others, the most similar first."""
        similarity = _numbers(line.get("similarity"), self.sets) if self.routes else {}
        return shown_sets(selected, similarity, _numbers(line.get("probability"), self.sets), line.get("weights"))


def shown_sets(
    selected: Sequence[str], similarity: dict[str, float], probability: dict[str, float], weights: Any = None
) -> list[dict[str, Any]]:
    """What a page says of the sets of one question, the most similar first: all inserted ones, and some others."""
    ranked = sorted(similarity, key=lambda name: -similarity[name])
    kept = [name for place, name in enumerate(ranked) if place < MOST_SETS or name in selected]
    kept += [name for name in reversed(selected) if name not in similarity]
    given = dict(zip(selected, weights, strict=False)) if isinstance(weights, list) else weights or {}
    return [
        {
            "name": name,
            "similarity": similarity.get(name),
            "probability": probability.get(name),
            "inserted": name in selected,
            "weight": given.get(name),
            "first": bool(ranked) and name == ranked[0],
        }
        for name in kept
    ]


def stages_of(run: RunFolder) -> dict[str, str]:
    """The evaluations with predictions, in order, by the names of their folders: what a page calls them."""
    found = {}
    if any(zero_shot_folder(run.path).glob("*.jsonl")):
        found[zero_shot_folder(run.path).name] = "zero-shot"
    for folder in reversed(after_folders(run.path)):
        number = int(folder.name.removeprefix("after-"))
        name = run.set_names[number - 1] if 0 < number <= len(run.set_names) else "more stages than the run has"
        if any(folder.glob("*.jsonl")):
            found[folder.name] = f"after stage {number}, {name}"
    return found


def _numbers(values: Any, names: Sequence[str]) -> dict[str, float]:
    """Numbers by the names of the sets; {} for anything but a list of at most so many numbers."""
    if not isinstance(values, list) or len(values) > len(names):
        return {}
    return {name: float(value) for name, value in zip(names, values, strict=False) if isinstance(value, int | float)}
