"""Applies `data.too_long` to samples that are too long for the model; rank 0 decides once, and the run stores it.

`refuse` raises an error at the start. `skip` leaves training samples out and scores test samples as wrong, with an
empty answer, so that a test set keeps its size. `truncate` shortens questions when they are tokenised (see
`pipeline.data.truncation`), in training and in tests, and refuses samples that stay too long.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.backbones.lmm_processor import load_processor, settings_fingerprint
from pipeline.config.data import DataConfig, TaskConfig
from pipeline.config.models import ModelConfig
from pipeline.data.conversation import Conversation
from pipeline.data.shards import IndexedShards
from pipeline.errors import UserErrors
from pipeline.files.atomic import write_json
from pipeline.planning.sample_lengths import SplitLengths, long_answers, measure
from pipeline.runs.layout import COMPLETE, LENGTHS_FILE, META, STAGES

log = logging.getLogger("pipeline.planning.too_long")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Decision:
    """Rows by split and task: those that are left out, and those that determine the peak memory of a step."""

    left_out: dict[str, list[list[int]]]
    telling: list[list[int]]  # of the training splits

    def counts(self, tasks: Sequence[TaskConfig]) -> dict[str, int]:
        """Number of samples left out, by task and split; without those that have none."""
        return {
            f"{task.name}/{split}": len(rows)
            for split in SPLITS
            for task, rows in zip(tasks, self.left_out[split], strict=True)
            if rows
        }


def conversation_of(model: ModelConfig, cuts: bool) -> Conversation:
    """Turns samples into tokens for a model, which itself is not loaded; `cuts`: see `DataConfig.cuts`."""
    return Conversation(load_processor(model), model.max_length, model.template, model.image_padding, cuts)


def decide(model: ModelConfig, data: DataConfig, run: Path, shards: dict[str, list[IndexedShards]]) -> Decision:
    """Decide for the prepared splits [T] of train and test; raises UserErrors for samples that `data.too_long` refuses.

    A decision in the run folder is reused if it was made for the same data and settings.
    """
    path = run / LENGTHS_FILE
    made_from = _made_from(model, data, shards)
    kept = _kept(path, made_from)
    if kept is not None:
        return Decision(kept["left_out"], kept["telling"])
    conversation, too_long = conversation_of(model, data.cuts), data.too_long
    found: dict[str, list[SplitLengths]] = {split: [] for split in SPLITS}
    notes: list[str] = []
    for split in SPLITS:
        for task, part in zip(data.tasks, shards[split], strict=True):
            name, limit = f"{task.name}/{split}", limit_of(task, split)
            found[split].append(measure(part, conversation, name, limit, answered=split == "train"))
            if split == "test":
                notes.append(long_answers(part, conversation, name, task.max_new_tokens, limit))
    learned = _learned(run)
    sentences = []
    for split in SPLITS:
        for task, lengths in zip(data.tasks, found[split], strict=True):
            wrong = lengths.sentences(too_long) + (_nothing_left(lengths, too_long) if split == "train" else [])
            if split == "train" and task.name in learned:
                notes += [f"{sentence} Its stage is finished: what was learned stays." for sentence in wrong]
            else:
                sentences += wrong
    if sentences:
        raise UserErrors(sentences)
    left_out = {split: [lengths.misfits if too_long == "skip" else [] for lengths in found[split]] for split in SPLITS}
    decision = Decision(left_out, [list(lengths.telling) for lengths in found["train"]])
    notes += [note for lengths in _all(found) if (note := length_note(lengths, too_long))]
    for note in filter(None, notes):
        log.warning("%s", note)
    if path.parent.is_dir():
        write_json(path, {"made_from": made_from, "left_out": left_out, "telling": decision.telling})
    return decision


def length_note(lengths: SplitLengths, too_long: str) -> str:
    """A sentence about samples that are left out or truncated; "" where there are none."""
    if too_long == "skip" and lengths.misfits:
        becomes = "left out of training" if lengths.name.endswith("/train") else "counted as wrong, with no answer"
        return f"{lengths.name}: {len(lengths.misfits)} of {lengths.count} samples are too long and {becomes}."
    if too_long == "truncate" and lengths.too_long:
        return f"{lengths.name}: the questions of {len(lengths.too_long)} of {lengths.count} samples are cut to fit."
    return ""


def limit_of(task: TaskConfig, split: str) -> int | None:
    """Number of samples of a task's split that the recipe uses; None: all."""
    return task.limit_train if split == "train" else task.limit_test


def _learned(run: Path) -> set[str]:
    """Tasks of finished stages, whose samples are not refused.

    Earlier versions trained without checking every sample's length; their runs have to stay usable.
    """
    tasks: set[str] = set()
    for finished in (run / STAGES).glob(f"*/{COMPLETE}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged stages are reported later
            tasks |= set(json.loads((finished.parent / META).read_text("utf-8"))["data"])
    return tasks


def _nothing_left(lengths: SplitLengths, too_long: str) -> list[str]:
    if too_long != "skip" or len(lengths.misfits) < lengths.count:
        return []
    return [
        f"{lengths.name}: all {lengths.count} samples are too long for model.max_length {lengths.most}, and "
        "data.too_long skip would leave none. Raise model.max_length, or lower model.image_tokens."
    ]


def _all(found: dict[str, list[SplitLengths]]) -> list[SplitLengths]:
    return [lengths for split in SPLITS for lengths in found[split]]


def _made_from(model: ModelConfig, data: DataConfig, shards: dict[str, list[IndexedShards]]) -> dict[str, Any]:
    return {
        "data": {split: [part.fingerprint for part in shards[split]] for split in SPLITS},
        "limits": [[task.limit_train, task.limit_test, task.max_new_tokens] for task in data.tasks],
        "model": [model.max_length, model.template, model.image_padding, data.too_long],
        "model_files": settings_fingerprint(model),
    }


def _kept(path: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text("utf-8"))
        return content if content["made_from"] == made_from and content["left_out"] and "telling" in content else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
