"""What an evaluation leaves of one task in its folder: answers, the sets they were given with, and the score."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.files.atomic import replacing
from pipeline.metrics.scoring import Answered, TaskScore, score_task
from pipeline.prompts.pool import PromptPool, tensor_fingerprint
from pipeline.runs.finished import write_json

if TYPE_CHECKING:
    from pipeline.sequence.evaluate import Test

SCORES_VERSION = 1  # higher when a metric gives other points to the same answers: then they are scored again
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
    pictured = test.data.keys.has_image.tolist()
    for index, sample in enumerate(test.texts):
        answered.append(Answered(answers[index], sample.answer, sample.meta, pictured[index]))
        lines.append(
            {
                "id": sample.id,
                "question": sample.question,
                "prediction": answers[index],
                "answer": sample.answer,
                "selected": chosen[index],
                "similarity": [round(s, 6) for s in scores[index].tolist()],
            }
        )
    scored = score_task(test.metric, answered, test.scoring)
    for line, points in zip(lines, scored.points, strict=True):
        line["score"] = points
    return lines, scored


def identity_of(test: Test, pool: PromptPool, selected: Tensor, projector: str) -> str:
    """A hash [hex] of what a task's predictions and score are a function of, beside what `made_with` says: the sets of
    every sample [N, m], the sets' values and prototypes, the metric."""
    facts = [SCORES_VERSION, test.metric, test.scoring, len(test.data), projector, pool.names, list(selected.shape)]
    facts.append(sorted(test.unanswered))
    facts += [pool.fingerprint(number) for number in range(len(pool))]
    facts += [tensor_fingerprint(pool.prototypes), tensor_fingerprint(selected)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def write_score(
    folder: Path, test: Test, scored: TaskScore, made_with: Mapping[str, Any], sets: Mapping[str, str], identity: str
) -> None:
    """Write what a task scored, and what tells later that its predictions are still these.

    `sets` as in SETS_FILE, which is one for all tasks of the folder: another of them may be answered with other sets.
    """
    written = (folder / f"{test.name}.jsonl").read_bytes()
    content = {
        "metric": test.metric,
        "scoring": test.scoring,
        "samples": len(scored.points),
        "score": scored.percent,
        "parts": scored.parts,
        "made_with": dict(made_with),
        "sets": dict(sets),
        "identity": identity,
        "predictions": {"bytes": len(written), "crc32": zlib.crc32(written)},
    }
    write_json(folder / f"{test.name}.score.json", content)


def finished_score(
    folder: Path, test: Test, made_with: Mapping[str, Any], sets: Mapping[str, str], identity: str
) -> float | None:
    """The score that is there, if it and the predictions are those of these samples, sets and settings, and whole.

    Nothing of them is parsed but the score file. None as well for what an earlier version wrote without an `identity`.
    """
    try:
        told = json.loads((folder / f"{test.name}.score.json").read_text("utf-8"))
        if told["made_with"] != dict(made_with) or told.get("identity") != identity:
            return None
        if json.loads((folder / SETS_FILE).read_text("utf-8")) != dict(sets) or not _as_written(
            folder, test.name, told
        ):
            return None
        return float(told["score"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _as_written(folder: Path, task: str, told: Mapping[str, Any]) -> bool:
    """Whether the predictions are the file that the score file `told` describes; True where it does not describe it."""
    if "predictions" not in told:
        return True
    content = (folder / f"{task}.jsonl").read_bytes()
    return told["predictions"] == {"bytes": len(content), "crc32": zlib.crc32(content)}


def write_if_other(path: Path, content: str) -> None:
    """Write a file unless it has this content already."""
    encoded = content.encode("utf-8")
    try:
        if path.stat().st_size == len(encoded) and path.read_bytes() == encoded:
            return
    except OSError:
        pass
    with replacing(path) as temporary:
        temporary.write_bytes(encoded)


def known_answers(
    task: str, folders: Iterable[Path], made_with: dict[str, Any]
) -> dict[tuple[str, tuple[str, ...]], str]:
    """Answers of earlier evaluations by (sample id, fingerprints of the projector and the inserted sets).

    Those that were made with other data, settings or model files than `made_with`, or were changed since they were
    written, are left alone; what a folder does not say of its answers is trusted.
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
                used = (prints.get(PROJECTOR, ""), *(prints[name] for name in line["selected"]))
                known[line["id"], used] = line["prediction"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not there, or not whole: it is generated anew
    return known
