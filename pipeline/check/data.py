"""Checks of the data: prepared splits and their routing keys, or the source where nothing is prepared yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from data_prep.bad_records import BadRecord
from data_prep.sources.base import source_class, source_split
from pipeline.check.findings import counted
from pipeline.config.data import DataConfig, TaskConfig
from pipeline.data.conversation import Conversation
from pipeline.data.sample import Sample
from pipeline.data.shards import DATASET_FILE, IndexedShards
from pipeline.data.stored_pictures import require_upright
from pipeline.errors import UserError, UserErrors
from pipeline.files.paths import command
from pipeline.metrics.scoring import Answered, score_task
from pipeline.planning.sample_lengths import long_answers, measure
from pipeline.planning.too_long import length_note, limit_of
from pipeline.runs.data_use import recorded_fingerprint
from pipeline.sequence.prepared import earlier_folder, other_data

SPLITS = ("train", "test")
NAMED = 5  # bad records named per split
LOOKED_AT = 3  # samples decoded per unprepared split: decoding all would take as long as preparing


class CheckedData:
    """Results of the data's checks: samples that were read, and the width of the CLIP keys where known."""

    def __init__(self, data: DataConfig, run: Path, name: str) -> None:
        self.data, self.run, self.name = data, run, name
        self.samples: list[Sample] = []  # of training, for the lengths of the memory plan
        self.key_width: int | None = None
        self.notes: list[str] = []  # information that is no problem
        self.misfits: dict[str, set[str]] = {}  # ids of samples that are too long or have a refused image
        self.bad = 0  # number of records that `prepare` would have to leave out

    def check(self, identity: Mapping[str, str] | None, conversation: Callable[[], Conversation] | None) -> str:
        """Check every task; raises UserErrors with all problems.

        Args:
            identity: of the recipe's CLIP, to check the keys against; None where it is not on this machine.
            conversation: makes the model's conversation, to check lengths; None where the model is unavailable.
        """
        data, found, wrong = self.data, [], []
        unprepared = [task for task in data.tasks if not self._prepared(task)]
        for task in data.tasks:
            if task in unprepared:
                continue
            try:
                found.append(self._task(task, identity, conversation))
            except UserErrors as errors:
                wrong += errors.sentences
            except UserError as error:
                wrong.append(str(error))
        if unprepared:
            wrong += self._sources(unprepared)
        if unprepared and data.prepare_first:
            left_out = f", {self.bad} bad records left out" * (self.bad > 0)
            found.append(f"{counted(len(unprepared), 'task')} that `run` prepares first{left_out}")
        elif unprepared:
            names = ", ".join(f"'{task.name}'" for task in unprepared)
            wrong.append(
                f"task{'s' * (len(unprepared) > 1)} {names} not prepared: there is no "
                f"{data.split_path(unprepared[0].name, SPLITS[0]) / DATASET_FILE}"
                f"{' and so on' * (len(unprepared) > 1)}; run `{command('prepare', self.name)}`"
                f"{' once the data is there' * (len(wrong) > 0)}.{earlier_folder(data, unprepared[0].name)}"
            )
        if wrong:
            raise UserErrors(wrong)
        notes = "".join(f"; {note}" for note in self.notes if note)
        return f"{data.prepared} (train/test): {', '.join(found)}{notes}"

    def _prepared(self, task: TaskConfig) -> bool:
        return all((self.data.split_path(task.name, split) / DATASET_FILE).is_file() for split in SPLITS)

    def _task(
        self, task: TaskConfig, identity: Mapping[str, str] | None, conversation: Callable[[], Conversation] | None
    ) -> str:
        counts, wrong = [], []
        for split in SPLITS:
            shards = IndexedShards(self.data.split_path(task.name, split))
            counts.append(str(len(shards)))
            try:
                require_upright(shards)
                self.key_width = shards.keys(identity).image.shape[1]
            except UserError as error:
                wrong.append(str(error))
            wrong += self._other_data(task, split, shards)
            rows, sentences = self._lengths(task, split, shards, conversation)
            wrong += sentences
            samples = telling_samples(shards, rows)
            wrong += self._samples(task, split, samples, conversation)
            if split == "train":
                self.samples += samples
            else:
                wrong += self._credit(task, samples)
        if wrong:
            raise UserErrors(wrong)
        return f"{task.name} {'/'.join(counts)}"

    def _other_data(self, task: TaskConfig, split: str, shards: IndexedShards) -> list[str]:
        """Problems with a split that was prepared with other settings, or whose source has changed."""
        used = recorded_fingerprint(self.run, task.name, split)
        look = not self.data.prepare_first and used != shards.fingerprint  # else `run` prepares it or resumes
        return other_data(self.data, task, split, shards.description, source=look, images=True)

    def _lengths(
        self, task: TaskConfig, split: str, shards: IndexedShards, conversation: Callable[[], Conversation] | None
    ) -> tuple[list[int], list[str]]:
        """Rows that determine the memory of a step, and problems with samples that are too long."""
        if conversation is None:
            return [], []
        limit, too_long = limit_of(task, split), self.data.too_long
        name = f"{task.name}/{split}"
        try:
            lengths = measure(shards, conversation(), name, limit, answered=split == "train")
            if split == "test":
                self.notes.append(long_answers(shards, conversation(), name, task.max_new_tokens, limit))
        except UserError as error:
            return [], [str(error)]
        sentences = lengths.sentences(too_long)
        self.misfits[name] = {shards.ids[row] for row in lengths.misfits}
        if not sentences:
            self.notes.append(length_note(lengths, too_long))
        return list(lengths.telling), sentences

    def _samples(
        self, task: TaskConfig, split: str, samples: list[Sample], conversation: Callable[[], Conversation] | None
    ) -> list[str]:
        """Problems with samples whose image does not decode or that are too long for the model."""
        wrong = []
        counted = self.misfits.get(f"{task.name}/{split}", set())
        for sample in samples:
            if sample.id in counted:  # reported by `_lengths`
                continue
            if split == "test":
                sample = dataclasses.replace(sample, answer="", meta={})  # a test answer is not part of the prompt
            try:
                if conversation is not None:
                    conversation().example(sample)
                    continue
            except UserError as error:
                wrong.append(f"{task.name}/{split}: {error}")
                continue
            try:
                sample.picture()
            except Exception as error:  # Pillow raises many types for damaged files
                wrong.append(f"{task.name}/{split}: the image of sample '{sample.id}' cannot be decoded ({error}).")
        return wrong

    def _credit(self, task: TaskConfig, samples: list[Sample]) -> list[str]:
        """The problem, if any, that the task's metric gives no sample a point for its own reference answer."""
        true = [Answered(sample.answer, sample.answer, sample.meta, sample.image is not None) for sample in samples]
        if not true or score_task(task.metric, true, self.data.scoring).percent > 0:
            return []
        return [
            f"{task.name}/test: the metric {task.metric} gives no point to the samples' own answers (the first is "
            f"{true[0].answer!r}); set the metric that fits the task's answers."
        ]

    def _sources(self, tasks: list[TaskConfig]) -> list[str]:
        """Files that `prepare` would miss for these tasks, with their download locations."""
        data = self.data
        source = source_class(data)
        if source.drawn:
            return []
        wrong = source.missing(data, tasks)
        for task in tasks:
            if not source.task_folder(Path(data.root), task.name).is_dir():
                continue
            found = []
            for split in SPLITS:
                try:
                    found += self._source_samples(task, split)
                except UserError as error:
                    found.append(f"{task.name}/{split}: {error}")
            fetch = source.fetching(data, task.name) if found else None
            wrong += [*found, *([fetch] if fetch else [])]
        return wrong

    def _source_samples(self, task: TaskConfig, split: str) -> list[str]:
        """Problems with bad records of a split: of all its files, but of the first few images only."""
        source = source_split(self.data, task, split)
        first = list(islice(source.records(), LOOKED_AT))
        samples = [record for record in first if not isinstance(record, BadRecord)]
        if split == "train":
            self.samples += samples
        bad = {record.sentence(): None for record in first if isinstance(record, BadRecord)}
        bad |= {record.sentence(): None for record in source.unusable()}
        self.bad += len(bad)
        wrong = self._credit(task, samples) if split == "test" else []
        if self.bad > self.data.skip_bad:
            wrong += [f"{task.name}/{split}: {sentence}" for sentence in list(bad)[:NAMED]]
            more = len(bad) - NAMED
            wrong += [f"{task.name}/{split}: {more} more bad record{'s' * (more > 1)}."] * (more > 0)
        return wrong


def telling_samples(shards: IndexedShards, rows: list[int]) -> list[Sample]:
    """The first and last sample of a split and those of `rows`; without rows the one with most characters."""
    if not len(shards):
        return []
    return [shards[row] for row in sorted({0, len(shards) - 1, *(rows or [int(np.argmax(shards.lengths))])})]
