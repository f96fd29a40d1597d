"""What an evaluation leaves of one task in its folder: answers, the sets they were given with, and the score."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.checkpoint import write_json
from pipeline.metrics.scoring import Answered, TaskScore, score_task

if TYPE_CHECKING:
    from pipeline.evaluate import Test

SETS_FILE = "sets.json"  # beside the predictions: the fingerprint of every prompt set by name
UNFINISHED_FILE = "{}.unfinished.json"  # the answers that there were when an evaluation was stopped
PROJECTOR = "<projector>"  # and, where the projector is trained, its fingerprint under a name that no task can have


def keep_answers(
    folder: Path, test: Test, answers: dict[int, str], wanted: list[tuple[str, ...]], made_with: dict[str, Any]
) -> None:
    """Write the answers of an unfinished evaluation, for `known_answers` of the next attempt."""
    kept = [(test.data.ids[index], wanted[index], prediction) for index, prediction in sorted(answers.items())]
    write_json(folder / UNFINISHED_FILE.format(test.name), {"made_with": made_with, "answers": kept})


def scored_lines(
    test: Test, answers: dict[int, str], chosen: list[list[str]], scores: Tensor
) -> tuple[list[dict[str, Any]], TaskScore]:
    """The lines of a task's prediction file, and its score."""
    lines: list[dict[str, Any]] = []
    answered: list[Answered] = []
    for index, identity in enumerate(test.data.ids):
        sample = test.data[index]
        answered.append(Answered(answers[index], sample.answer, sample.meta, sample.image is not None))
        lines.append({
            "id": identity, "question": sample.question, "prediction": answers[index], "answer": sample.answer,
            "selected": chosen[index], "similarity": [round(s, 6) for s in scores[index].tolist()],
        })  # fmt: skip
    scored = score_task(test.metric, answered, test.scoring)
    for line, points in zip(lines, scored.points, strict=True):
        line["score"] = points
    return lines, scored


def known_answers(
    task: str, folders: Iterable[Path], made_with: dict[str, Any]
) -> dict[tuple[str, tuple[str, ...]], str]:
    """Answers of earlier evaluations by (sample id, fingerprints of the projector and the inserted sets).

    Those that were made with other data, settings or model files than `made_with` are left alone; what a folder does
    not say of its answers is trusted.
    """
    known: dict[tuple[str, tuple[str, ...]], str] = {}
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            unfinished = json.loads((folder / UNFINISHED_FILE.format(task)).read_text("utf-8"))
            if unfinished["made_with"] == made_with:
                known |= {(identity, tuple(used)): answer for identity, used, answer in unfinished["answers"]}
        try:
            told = json.loads((folder / f"{task}.score.json").read_text("utf-8")).get("made_with", made_with)
        except (OSError, ValueError, AttributeError):
            told = made_with
        if any(told.get(name, value) != value for name, value in made_with.items()):
            continue
        try:
            prints = json.loads((folder / SETS_FILE).read_text("utf-8"))
            lines = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text("utf-8").splitlines()]
            for line in lines:
                used = (prints.get(PROJECTOR, ""), *(prints[name] for name in line["selected"]))
                known[line["id"], used] = line["prediction"]
        except (OSError, ValueError, KeyError):
            continue  # not there, or not whole: it is generated anew
    return known
