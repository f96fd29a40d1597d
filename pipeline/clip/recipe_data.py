"""The data section of a benchmark recipe: datasets and their folders, training images and evaluated classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.clip.images.datasets import DATASETS, Dataset, Layout
from pipeline.clip.images.few_shot import Fewer
from pipeline.clip.methods.base import TEMPLATE
from pipeline.clip.towers.text import MARK
from pipeline.config.base import PREPARED, Name, Section, each_once
from pipeline.config.given_paths import GivenPath
from pipeline.errors import nearest

Protocol = Literal["base_to_new", "cross_dataset", "all_classes", "active"]
DATASET_CONTENT = {"layout", "folder", "images", "split"}
UNLABELLED_CONTENT = {"classes", "test"}
_WITH_SPLIT = ("split_zhou", "csv")  # layouts whose splits are read from a file that the recipe names
NONE_OF_THESE = "-"  # what a person answers for an image of no class, so no class may be called so


class DatasetConfig(Section):
    """One dataset: a published one by its name alone, or any other with its folder and layout."""

    name: Name = Field(description="name of a published dataset, or of one of your own")
    layout: Layout | None = Field(None, description="how the folder is organised; null: as published")
    folder: GivenPath | None = Field(
        None, description="the dataset's folder under the root; null: as published, or its name"
    )
    images: GivenPath | None = Field(
        None, description="the folder of the images in the dataset's folder; null: as published, or that folder itself"
    )
    split: GivenPath | None = Field(None, description="name of the split file (split_zhou) or of the CSV file")
    template: str | None = Field(None, description="text template, with {} for the class name; null: as published")
    classes: tuple[str, ...] | None = Field(
        None,
        min_length=2,
        description="unlabelled: the class names; null: the lines of classes.txt in the dataset's folder",
    )
    test: GivenPath | None = Field(
        None,
        description="unlabelled: a folder in the images' folder with labelled images to score on, one folder per "
        "class; null: there are none, and nothing is scored",
    )

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

    @model_validator(mode="after")
    def _classes_are_said_where_no_label_says_them(self) -> DatasetConfig:
        said = [name for name in ("classes", "test") if getattr(self, name) is not None]
        if said and self.layout != "unlabelled":
            raise ValueError(
                f"dataset '{self.name}' has {' and '.join(said)}, which belong to the layout unlabelled; leave them "
                "out, or set layout to unlabelled"
            )
        if self.classes is not None:
            refuse_class_list(self.classes, f"dataset '{self.name}'")
        return self

    @property
    def labelled(self) -> bool:
        """Whether its training images have labels."""
        return self.layout != "unlabelled"

    @property
    def tested(self) -> bool:
        """Whether it has test images."""
        return self.labelled or self.test is not None

    @property
    def description(self) -> Dataset:
        """The published dataset with the recipe's changes, or a description of the user's own dataset."""
        known = DATASETS.get(self.name)
        given = {field: getattr(self, field) for field in ("folder", "images", "split", "template")}
        changes = {field: value for field, value in given.items() if value is not None}
        if self.layout is None and known is not None:
            return replace(known, **changes)
        template = known.template if known is not None else TEMPLATE
        own = Dataset(self.name, 0, self.name, ".", 0, 0, 0, "", template, None, self.layout or "class_folders")
        return replace(own, **changes, class_list=self.classes, test_folder=self.test)


def refuse_class_list(names: Sequence[str], where: str) -> None:
    """Raise ValueError for class names of which one is empty, twice there, or what a person answers for no class."""
    wrong = [name for name in names if not name.strip() or name.strip() == NONE_OF_THESE]
    if wrong:
        raise ValueError(
            f"{where} has a class '{wrong[0]}'; expected names to show to a person and to CLIP ('{NONE_OF_THESE}' is "
            "the answer for an image of no class)"
        )
    each_once("class", names, f" in {where}")


class ClipDataConfig(Section):
    """Where the images come from, which of them are trained on, and the evaluation protocol."""

    source: Literal["folders", "generated"] = Field(
        "folders", description="folders: read root as it is; generated: draw coloured shapes there first"
    )
    root: GivenPath = Field(description="folder that holds one folder per dataset")
    prepared: GivenPath = Field(
        PREPARED,
        description="folder of the shards: <prepared>/<dataset>/<split>/; {settings} is filled in from the settings "
        "that determine their content (source, root, shots, generator's seed, layouts)",
    )
    datasets: tuple[DatasetConfig, ...] = Field(min_length=1, description="datasets to train on, each separately")
    protocol: Protocol = Field(
        "base_to_new",
        description="base_to_new: train on the first half of the classes, evaluate on each half; all_classes: train "
        "and evaluate on all classes; cross_dataset: train on all classes, evaluate on the targets too; active: train "
        "on the images that a row asks the labels of, round by round, and evaluate on all classes after each",
    )
    targets: tuple[DatasetConfig, ...] = Field((), description="cross_dataset: datasets that are only evaluated")
    shots: int | None = Field(16, ge=1, description="training images per class; null: all")
    fewer: Fewer = Field(
        "refuse",
        description="a class with fewer training images than shots: refuse stops with an error, all takes all it has",
    )
    shard_samples: int = Field(1000, ge=1, description="samples per shard")
    workers: int = Field(2, ge=1, description="threads that decode images while preparing")
    skip_bad: int = Field(0, ge=0, description="number of missing or damaged test images that may be left out")
    prepare_first: bool = Field(False, description="true: run and train prepare missing data before they start")
    seed: int = Field(0, ge=0, description="seed of the generated images; independent of the seeds of the benchmark")

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
        if self.protocol == "active" and self.shots is not None:
            raise ValueError(
                f"the protocol active asks for labels of the whole training split, and shots is {self.shots}; set "
                "data.shots to null"
            )
        return self

    @model_validator(mode="after")
    def _unlabelled_images_are_asked_about(self) -> ClipDataConfig:
        without = [entry.name for entry in (*self.datasets, *self.targets) if not entry.labelled]
        if without and self.protocol != "active":
            raise ValueError(
                f"the images of {without[0]} have no labels, which {self.protocol} needs; set data.protocol to active "
                "and active.oracle to file, so that a person is asked for them"
            )
        if without and self.source == "generated":
            raise ValueError(f"{without[0]} has the layout unlabelled, and generated images have labels; give folders")
        return self

    def split_path(self, dataset: str, split: str) -> Path:
        """The folder that holds one prepared split of a dataset."""
        return Path(self.prepared) / dataset / split

    def split_settings(self, entry: DatasetConfig, split: str) -> dict[str, Any]:
        """The settings that, with the files under the root, determine a split's content; see `pipeline.data.origin`."""
        settings = {"source": self.source, **entry.model_dump(mode="json", include=DATASET_CONTENT)}
        if entry.test is not None:
            settings["test"] = entry.test
        if split in ("train", "val"):
            settings |= {"shots": self.shots, "fewer": self.fewer}
        if self.source == "generated":
            settings["seed"] = self.seed
        return settings
