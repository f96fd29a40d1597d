"""The data of a benchmark recipe: which datasets, where they are, what is learned from and what is evaluated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.clip.images.datasets import DATASETS, Dataset, Layout
from pipeline.clip.images.few_shot import Fewer
from pipeline.clip.methods.base import TEMPLATE
from pipeline.clip.towers.text import MARK
from pipeline.config.base import PREPARED, Name, Section, each_once
from pipeline.errors import nearest
from pipeline.files.paths import GivenPath

Protocol = Literal["base_to_new", "cross_dataset", "all_classes"]
DATASET_CONTENT = {"layout", "folder", "images", "split"}
_WITH_SPLIT = ("split_zhou", "csv")  # layouts that read their splits from a file the recipe names


class DatasetConfig(Section):
    """One dataset: a published one by its name alone, or any other with its folder and layout."""

    name: Name = Field(description="name of a published dataset, or of one of your own")
    layout: Layout | None = Field(None, description="how the folder is organised; null: as published")
    folder: GivenPath | None = Field(
        None, description="the dataset's folder under the root; null: as published, or its name"
    )
    images: GivenPath | None = Field(None, description="the folder of the images in it; null: as published, or itself")
    split: GivenPath | None = Field(None, description="name of the split file (split_zhou) or of the CSV file")
    template: str | None = Field(None, description="what a text says, with {} for the class name; null: as published")

    @model_validator(mode="after")
    def _known_or_complete(self) -> DatasetConfig:
        if self.template is not None and MARK not in self.template:
            raise ValueError(f"the template '{self.template}' needs {MARK} where the class name goes")
        if self.layout is None and self.name not in DATASETS:
            raise ValueError(
                f"'{self.name}' is none of the published datasets ({', '.join(DATASETS)}); give its layout and folder."
                + nearest(self.name, DATASETS)
            )
        layout = self.layout or DATASETS[self.name].layout
        if self.layout in _WITH_SPLIT and self.split is None:
            raise ValueError(f"dataset '{self.name}' of layout {layout} needs the name of its file in split")
        if self.split is not None and layout not in _WITH_SPLIT:
            raise ValueError(
                f"dataset '{self.name}' of layout {layout} has no split file, and split is '{self.split}'; leave it "
                f"out, or set layout to one that has one ({', '.join(_WITH_SPLIT)})"
            )
        return self

    @property
    def description(self) -> Dataset:
        """The dataset as it is described: the published one with what the recipe changes, or one of the user's own."""
        known = DATASETS.get(self.name)
        given = {field: getattr(self, field) for field in ("folder", "images", "split", "template")}
        changes = {field: value for field, value in given.items() if value is not None}
        if self.layout is None and known is not None:
            return replace(known, **changes)
        template = known.template if known is not None else TEMPLATE
        own = Dataset(self.name, 0, self.name, ".", 0, 0, 0, "", template, None, self.layout or "class_folders")
        return replace(own, **changes)


class ClipDataConfig(Section):
    """Where images come from, which of them are learned from, and what is asked."""

    source: Literal["folders", "generated"] = Field(
        "folders", description="folders: read root as it is; generated: draw coloured shapes there first"
    )
    root: GivenPath = Field(description="folder that holds one folder per dataset")
    prepared: GivenPath = Field(
        PREPARED,
        description="folder of the shards: <prepared>/<dataset>/<split>/; {settings} is filled in from what decides "
        "on their content (source, root, shots, generator's seed, layouts)",
    )
    datasets: tuple[DatasetConfig, ...] = Field(min_length=1, description="what is trained on, each by itself")
    protocol: Protocol = Field(
        "base_to_new",
        description="base_to_new: train on the first half of the classes, evaluate both halves; all_classes: both on "
        "all; cross_dataset: train on all classes, evaluate also on the targets",
    )
    targets: tuple[DatasetConfig, ...] = Field((), description="datasets of cross_dataset that are only evaluated")
    shots: int | None = Field(16, ge=1, description="training images per class; null: all")
    fewer: Fewer = Field("refuse", description="all: a class with fewer images than shots gives what it has")
    shard_samples: int = Field(1000, ge=1, description="samples per shard")
    workers: int = Field(2, ge=1, description="threads that decode images while preparing")
    skip_bad: int = Field(0, ge=0, description="leave out up to so many missing or damaged test images")
    prepare_first: bool = Field(False, description="true: run and train prepare what is missing before they start")
    seed: int = Field(0, ge=0, description="seed of the generator; the seeds of the runs do not change the data")

    @field_validator("datasets", "targets", mode="before")
    @classmethod
    def _names_alone(cls, entries: Any) -> Any:
        if not isinstance(entries, list | tuple):
            return entries
        return [{"name": entry} if isinstance(entry, str) else entry for entry in entries]

    @model_validator(mode="after")
    def _each_once_and_targets_where_they_belong(self) -> ClipDataConfig:
        each_once("dataset", (entry.name for entry in (*self.datasets, *self.targets)))
        if bool(self.targets) != (self.protocol == "cross_dataset"):
            raise ValueError("targets belong to the protocol cross_dataset, which needs at least one")
        return self

    def split_path(self, dataset: str, split: str) -> Path:
        """The folder that holds one prepared split of a dataset."""
        return Path(self.prepared) / dataset / split

    def split_settings(self, entry: DatasetConfig, split: str) -> dict[str, Any]:
        """What decides on the content of one split, beside the files under the root; see `pipeline.data.origin`."""
        settings = {"source": self.source, **entry.model_dump(mode="json", include=DATASET_CONTENT)}
        if split == "train":
            settings |= {"shots": self.shots, "fewer": self.fewer}
        if self.source == "generated":
            settings["seed"] = self.seed
        return settings
