"""The answers to one task's test questions in the run folder: which can be reused, and how they are stored.

An answer is a function of its question, the inserted prompt sets, a trained projector and the model. An answer of an
earlier evaluation is reused where the fingerprints of all of these match.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from pipeline.data.selection import Selection
from pipeline.files.atomic import write_if_other, write_json
from pipeline.metrics.format_free import format_free_percent
from pipeline.metrics.scoring import Answered, TaskScore, metric_of, score_task
from pipeline.prompts.pool import PromptPool, tensor_fingerprint
from pipeline.prompts.routing import Routed
from pipeline.sequence.test_set import TestSet

SCORES_VERSION = 1  # increase when a metric scores the same answers differently, so that they are scored again
SETS_FILE = "sets.json"  # beside the predictions: the fingerprint of every prompt set by name
UNFINISHED_FILE = "{}.unfinished.json"  # the answers of a stopped evaluation
PROJECTOR = "<projector>"  # the name of a trained projector's fingerprint in SETS_FILE; no task can have this name

# A sample's modules by name, and their weights; None where each has weight 1.
Modules: TypeAlias = "tuple[list[str], list[float] | None]"


@dataclass(frozen=True)
class AnswerKey:
    """What an answer depends on besides its question and the sets inserted for it."""

    insertion: str = "after_bos"
    projector: str = ""  # fingerprint of a trained image projector; "": the base model's
    # Fingerprints of the base model and its files by name, stored with the answers; reuse requires all to match.
    made_by: Mapping[str, str] = field(default_factory=dict)
    # The router with its options, whose scores are written with the answers; "" for `mean` and `prototype`, whose
    # scores follow from the states.
    router: str = ""


@dataclass(frozen=True)
class AnswerStore:
    """The folder of an evaluation's answers, and folders of answers that it may reuse."""

    folder: Path
    earlier: Sequence[Path] = ()  # folders of earlier evaluations
    key: AnswerKey = field(default_factory=AnswerKey)

    def task(self, test: TestSet, pool: PromptPool, routed: Routed) -> TaskAnswers:
        """The answers to one task's test set with these sets of the pool."""
        return TaskAnswers(self, test, pool, routed)


class TaskAnswers:
    """The answers to one task's test questions, on rank 0: reused and new ones, and finally their score."""

    def __init__(self, store: AnswerStore, test: TestSet, pool: PromptPool, routed: Routed) -> None:
        self.test, self.routed, self.answers = test, routed, dict[int, str]()
        self._folder, self._earlier, self._key, self._pool = store.folder, store.earlier, store.key, pool
        self._prints = {name: pool.fingerprint(number) for number, name in enumerate(pool.names)}
        projector = {PROJECTOR: self._key.projector} if self._key.projector else {}
        self._sets = {**self._prints, **projector}  # for SETS_FILE
        self._made_with: dict[str, Any] = {
            "data": test.data.fingerprint,
            "max_new_tokens": test.max_new_tokens,
            "insertion": self._key.insertion,
            **self._key.made_by,
        }

    @functools.cached_property
    def _chosen(self) -> list[Modules]:
        """Every sample's modules."""
        return named_modules(self.routed.selection, self._pool.names)

    @functools.cached_property
    def _wanted(self) -> list[tuple[str, ...]]:
        """For every sample the fingerprints of projector and modules that a reused answer must have been made with."""
        return [(self._key.projector, *made_of(modules, self._prints)) for modules in self._chosen]

    @functools.cached_property
    def _written(self) -> Collection[int]:
        """The samples whose predictions are written, in ascending order: all of them."""
        return range(len(self.test.data))

    @property
    def _identity(self) -> str:
        return identity_of(self.test, self._pool, self.routed.selection, self._key)

    def finished_score(self) -> float | None:
        """The stored score in percent if it belongs to these samples, sets and settings, else None.

        Only the score file is parsed; predictions are compared by size and checksum. None also for score files of
        versions that wrote no `identity`.
        """
        try:
            told = json.loads((self._folder / f"{self.test.name}.score.json").read_text("utf-8"))
            if told["made_with"] != self._made_with or told.get("identity") != self._identity:
                return None
            if json.loads((self._folder / SETS_FILE).read_text("utf-8")) != self._sets:
                return None
            return float(told["score"]) if _as_written(self._folder, self.test.name, told) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def missing(self) -> list[int]:
        """The samples without a reusable answer; the answers to all others are loaded."""
        self.answers.update(dict.fromkeys(self.test.unanswered, ""))
        missing = [index for index in range(len(self.test.data)) if index not in self.answers]
        for folders in self._sources():
            known = known_answers(self.test.name, folders, self._made_with)
            wants = [(index, (self.test.data.ids[index], self._wanted[index])) for index in missing]
            self.answers.update({index: known[want] for index, want in wants if want in known})
            missing = [index for index in missing if index not in self.answers]
            if not missing:
                break
        return missing

    def _sources(self) -> Iterable[Sequence[Path]]:
        """Folders with reusable answers, in groups that are read until no answer is missing; here one group."""
        return [[self._folder, *self._earlier]]

    def keep(self, answers: Mapping[int, str]) -> None:
        """Add new answers by sample and write all answers so far, which the next attempt reuses.

        They are written before they are scored, so that a failing metric does not lose them.
        """
        self.answers.update(answers)
        ids = self.test.data.ids
        written = [index for index in self._written if index in self.answers]
        kept = [(ids[index], self._wanted[index], self.answers[index]) for index in written]
        content = {"made_with": self._made_with, "answers": kept}
        write_json(self._folder / UNFINISHED_FILE.format(self.test.name), content)

    def finish(self) -> float:
        """Write predictions with their points, and the score; returns the score in percent."""
        lines, scored, format_free = self._scored_lines()
        write_if_other(self._folder / SETS_FILE, json.dumps(self._sets, indent=2, ensure_ascii=False) + "\n")
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_if_other(self._folder / f"{self.test.name}.jsonl", content)
        self._write_score(scored, format_free)
        (self._folder / UNFINISHED_FILE.format(self.test.name)).unlink(missing_ok=True)
        return scored.percent

    def _scored_lines(self) -> tuple[list[dict[str, Any]], TaskScore, float]:
        """The predictions' lines, their score, and the score that ignores format."""
        lines: list[dict[str, Any]] = []
        answered: list[Answered] = []
        pictured = self.test.data.keys.has_image.tolist()
        for index, sample in enumerate(self.test.texts):
            answered.append(Answered(self.answers[index], sample.answer, sample.meta, pictured[index]))
            if index not in self._written:
                continue
            names, weights = self._chosen[index]
            line: dict[str, Any] = {
                "id": sample.id,
                "question": sample.question,
                "prediction": self.answers[index],
                "answer": sample.answer,
                "selected": names,
                "similarity": [round(s, 6) for s in self.routed.scores[index].tolist()],
            }
            lines.append({**line, **({} if weights is None else {"weights": weights}), **self._recognised(index)})
        scored = score_task(self.test.metric, answered, self.test.scoring)
        format_free = format_free_percent(metric_of(self.test.metric), answered, scored)
        for line, index in zip(lines, self._written, strict=True):
            line["score"] = scored.points[index]
        return lines, scored, format_free

    def _recognised(self, index: int) -> dict[str, Any]:
        """Probabilities [T] of a sample's tasks and whether it resembles none, where they are known."""
        routed, found = self.routed, dict[str, Any]()
        if routed.probabilities is not None:
            found["probability"] = [round(share, 6) for share in routed.probabilities[index].tolist()]
        if routed.unfamiliar is not None:
            found["unfamiliar"] = bool(routed.unfamiliar[index])
        return found

    def _write_score(self, scored: TaskScore, format_free: float) -> None:
        """Write the task's score with the facts by which it and its predictions are verified later.

        The sets are included, because SETS_FILE belongs to all tasks of the folder and may be rewritten with others.
        """
        written = (self._folder / f"{self.test.name}.jsonl").read_bytes()
        content = {
            "metric": self.test.metric,
            "scoring": self.test.scoring,
            "samples": len(scored.points),
            "score": scored.percent,
            "parts": scored.parts,
            "format_free": format_free,
            "made_with": self._made_with,
            "sets": self._sets,
            "identity": self._identity,
            "predictions": {"bytes": len(written), "crc32": zlib.crc32(written)},
        }
        write_json(self._folder / f"{self.test.name}.score.json", content)


def named_modules(selection: Selection, names: Sequence[str]) -> list[Modules]:
    """Every sample's modules by name, with their weights where the selection has any."""
    weighted = selection.weights is not None
    return [([names[n] for n, _ in row], [w for _, w in row] if weighted else None) for row in selection.listed()]


def made_of(modules: Modules, prints: Mapping[str, str]) -> tuple[str, ...]:
    """The fingerprints of an answer's modules with their weights, on which the answer depends besides its question.

    Every module with a weight is named, so an answer is reused only where none of them has changed.
    """
    names, weights = modules
    if weights is None:
        return tuple(prints[name] for name in names)
    return tuple(f"{prints[name]}*{weight!r}" for name, weight in zip(names, weights, strict=True))


def identity_of(test: TestSet, pool: PromptPool, selection: Selection, key: AnswerKey) -> str:
    """A hash [hex] of what a task's predictions and score depend on besides `made_with`.

    These are the modules of every sample with their weights, the modules' values, the routing state, the router, the
    projector, and the metric.
    """
    selected = selection.numbers
    facts: list[Any] = [SCORES_VERSION, test.metric, test.scoring, len(test.data), key.projector, pool.names]
    facts += [list(selected.shape), sorted(test.unanswered)]
    facts += [pool.fingerprint(number) for number in range(len(pool))]
    facts += [pool.states_fingerprint(), tensor_fingerprint(selected)]
    facts += [] if selection.weights is None else [tensor_fingerprint(selection.weights)]
    facts += [key.router] if key.router else []
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _as_written(folder: Path, task: str, told: Mapping[str, Any]) -> bool:
    """Whether the prediction file matches the size and checksum in the score file `told`; True where it has none."""
    if "predictions" not in told:
        return True
    content = (folder / f"{task}.jsonl").read_bytes()
    return told["predictions"] == {"bytes": len(content), "crc32": zlib.crc32(content)}


def known_answers(
    task: str, folders: Iterable[Path], made_with: Mapping[str, Any]
) -> dict[tuple[str, tuple[str, ...]], str]:
    """Answers of earlier evaluations by (sample id, fingerprints of the projector and the inserted sets).

    Answers made with other data, settings or model files than `made_with`, and files changed since they were written,
    are skipped. Facts that a folder of an earlier version does not record are assumed to match.
    """
    known: dict[tuple[str, tuple[str, ...]], str] = {}
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            unfinished = json.loads((folder / UNFINISHED_FILE.format(task)).read_text("utf-8"))
            if unfinished["made_with"] == made_with:
                known |= {(identity, tuple(used)): answer for identity, used, answer in unfinished["answers"]}
        try:
            written = json.loads((folder / f"{task}.score.json").read_text("utf-8"))
            told = written.get("made_with", made_with)
        except (OSError, ValueError, AttributeError):
            written, told = {}, made_with
        if any(told.get(name, value) != value for name, value in made_with.items()):
            continue
        try:
            if not _as_written(folder, task, written):
                continue
            prints = written["sets"] if "sets" in written else json.loads((folder / SETS_FILE).read_text("utf-8"))
            lines = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text("utf-8").splitlines()]
            for line in lines:
                used = (prints.get(PROJECTOR, ""), *made_of((line["selected"], line.get("weights")), prints))
                known[line["id"], used] = line["prediction"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # missing or incomplete: the answers are generated again
    return known
