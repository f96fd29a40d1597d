"""The section `data` of a task sequence: its tasks, the source of their samples, and their preparation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pipeline.config import registry
from pipeline.config.base import PREPARED, Name, Section, each_once
from pipeline.config.given_paths import GivenPath
from pipeline.config.method import FromRegistry
from pipeline.data.origin import LIMIT
from pipeline.errors import nearest

TASK_CONTENT = {"limit_train", "limit_test", "train_files", "test_files", "annotations"}


def known_name(kind: str, name: str) -> str:
    """The name, if `pipeline.config.registry` knows it; ValueError, for pydantic, otherwise."""
    if not registry.knows(kind, name):
        known = sorted(registry.names(kind))
        raise ValueError(f"expected one of {', '.join(known)}.{nearest(name, known)}")
    return name


class TaskConfig(Section):
    """One task of the sequence."""

    name: Name = Field(description="folder of the task under the data's instructions/")
    metric: Annotated[str, FromRegistry("metrics")] = Field("exact", description="how answers are scored")
    max_new_tokens: int = Field(16, ge=1, description="longest answer that is generated, in tokens")
    limit_train: int | None = Field(
        None,
        ge=1,
        description="number of training samples that are used, the first ones; includes those that "
        "data.validation_share holds out",
    )
    limit_test: int | None = Field(None, ge=1, description="number of test samples that are used, the first ones")
    train_files: tuple[GivenPath, ...] = Field(
        (), description="files of the training split in the task's folder; empty: train.json and its numbered parts"
    )
    test_files: tuple[GivenPath, ...] = Field(
        (), description="files of the test split in the task's folder; empty: test.json or val.json and numbered parts"
    )
    annotations: GivenPath | None = Field(
        None,
        description="file under the root with further answers to the test questions (ten annotators, choices, "
        "captions); null: files with the benchmarks' own names, where they exist",
    )

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, metric: str) -> str:
        return known_name("metrics", metric)


class DataConfig(Section):
    """The source of the samples, and the folder of the prepared data."""

    source: Annotated[str, FromRegistry("sources")] = Field(
        description="data format of the tasks under root. coin: instructions/<Task>/{train,test}.json; generated: the "
        "embedded tasks, which are first drawn there in this format"
    )
    root: GivenPath = Field(description="folder of the tasks and their images")
    prepared: GivenPath = Field(
        PREPARED,
        description="folder of the shards: <prepared>/<task>/<split>/; {settings} is filled in from the settings that "
        "determine their content (source, root, limits, files, generator's seed, repeated ids, the CLIP of the keys)",
    )
    tasks: tuple[TaskConfig, ...] = Field(min_length=1, description="the tasks in the order they are learned")
    prepare_first: bool = Field(False, description="true: run and train prepare what is missing before they start")
    shard_samples: int = Field(1000, ge=1, description="samples per shard")
    workers: int = Field(2, ge=1, description="threads that decode images while preparing")
    seed: int = Field(0, ge=0, description="seed of the generator; the run's own seed does not change the data")
    validation_share: float = Field(
        0.05,
        ge=0,
        le=0.5,
        description="share of each task's training samples that no stage learns from: choices such as the gate are "
        "made with them, never with test samples; chosen by a hash of their ids; 0: none",
    )
    validation_most: int = Field(500, ge=1, description="most samples of one task that are held out")
    scoring: Literal["fixed", "compat"] = Field(
        "fixed", description="compat: score as the official scripts do, faults included (pipeline/metrics/compat.py)"
    )
    skip_bad: int = Field(0, ge=0, description="most bad records, over all tasks, that are left out")
    too_long: Literal["refuse", "skip", "truncate"] = Field(
        "refuse",
        description="samples of more tokens than model.max_length, and images that the model's processor cannot use, "
        "both counted before training. refuse: the run does not start; skip: training leaves them out, tests count "
        "them as wrong; truncate: further turns are dropped first, then the start of the question",
    )
    repeated_ids: Literal["refuse", "number"] = Field(
        "refuse", description="number: a record whose id was used before is kept as id#2, id#3, ..."
    )

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str) -> str:
        return known_name("sources", source)

    @field_validator("tasks")
    @classmethod
    def _unique_names(cls, tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
        each_once("task", (task.name for task in tasks))
        return tasks

    @property
    def cuts(self) -> bool:
        """Whether the questions of samples that are too long are cut to fit."""
        return self.too_long == "truncate"

    @property
    def drawn(self) -> bool:
        """Whether the source generates its files from `seed`, instead of reading the user's files under the root."""
        return bool(registry.load("sources", self.source).drawn)

    def split_path(self, task: str, split: str) -> Path:
        """Return the folder that holds one prepared split (train or test) of a task."""
        return Path(self.prepared) / task / split

    def split_settings(self, task: TaskConfig, split: str) -> dict[str, Any]:
        """The settings that determine a split's content, with the files under the root; see `pipeline.data.origin`."""
        train = split == "train"
        settings: dict[str, Any] = {"source": self.source, "repeated_ids": self.repeated_ids}
        settings[LIMIT] = task.limit_train if train else task.limit_test
        settings["files"] = list(task.train_files if train else task.test_files)
        if not train:
            settings["annotations"] = task.annotations
        if self.drawn:
            settings["seed"] = self.seed
        return settings
