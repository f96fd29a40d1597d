"""The units of a benchmark: one method on one dataset with one seed, its learner and its regularisers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.clip.images.classes import Group
from pipeline.clip.images.prepared import ClassGroup, PreparedDataset
from pipeline.clip.learning.descriptions import Descriptions
from pipeline.clip.methods import PromptLearner, make_learner, method_class
from pipeline.clip.methods.regulariser import Regulariser
from pipeline.clip.methods.regularisers import Consistency
from pipeline.clip.recipe import ClipMethodConfig, ClipRecipe
from pipeline.clip.recipe_data import ClipDataConfig, DatasetConfig
from pipeline.clip.recipe_search import SearchConfig
from pipeline.clip.towers.backbone import Backbone
from pipeline.clip.towers.text import Words
from pipeline.runs.layout import unit_folder


@dataclass(frozen=True)
class Unit:
    """One method on one dataset with one seed."""

    method: ClipMethodConfig
    dataset: DatasetConfig
    seed: int
    group: Group  # the classes it trains on
    groups: tuple[tuple[str, str, Group], ...]  # (name, dataset, classes) of each group it is evaluated on
    # What finds the lengths of its prompts before its training, and the lengths found, by tower and block.
    search: SearchConfig | None = field(default=None, kw_only=True)
    lengths: Mapping[str, list[int]] | None = field(default=None, kw_only=True)
    descriptions: Descriptions | None = field(default=None, kw_only=True)  # of its classes; None: their names alone

    first_step = 0  # the tracker's step before its first one

    @property
    def label(self) -> str:
        """The unit's name in the log and in MLflow, and the name of its folder."""
        return f"{self.method.name}-{self.dataset.name}-s{self.seed}"

    @property
    def row(self) -> tuple[str, str, int]:
        """Method, dataset and seed, which identify the unit's row in the results."""
        return self.method.name, self.dataset.name, self.seed

    @property
    def learns(self) -> bool:
        """Whether the method has trainables."""
        return method_class(self.method.kind).learns

    def folder(self, run: Path) -> Path:
        """The unit's folder in a run folder."""
        return unit_folder(run, self.label)

    def training_images(self, data: PreparedDataset) -> ClassGroup:
        """The images of its dataset that the unit trains on."""
        return data.few_shots(self.seed, self.group)

    def identity(self, data: PreparedDataset) -> str:
        """A hash of what determines the unit's training: class names, images and labels; of a pool without labels."""
        return data.pool_identity() if self.method.asks else data.identity(self.seed, self.group)

    def contexts(self, names: Sequence[str]) -> int:
        """The number of texts for these classes, each of which has a context of its own with `per_class`."""
        return len(names) if self.descriptions is None else len(self.descriptions.described(names))

    def options(self, contexts: int) -> dict[str, Any]:
        """The method's options when it trains on `contexts` texts, one per class without descriptions."""
        options = dict(self.method.options)
        if self.method.per_class:
            options["classes"] = contexts
        if self.search is not None:  # without lengths yet, the longest stand for them
            options |= self.search.longest if self.lengths is None else dict(self.lengths)
        known = inspect.signature(method_class(self.method.kind)).parameters
        further = {"template": self.dataset.description.template, "knowledge": self.method.knowledge}
        return {**{name: value for name, value in further.items() if name in known}, **options}


@dataclass(frozen=True)
class Round(Unit):
    """One round of a unit that asks for labels: it trains on the labels asked for so far.

    `seed` is the asking unit's plus the number of rounds before, so that each round has its own initial prompts.
    """

    asking: Unit
    number: int  # from 1
    place: Path  # its folder
    shots: ClassGroup  # the labelled images, in the order in which they were asked for
    first_step: int  # optimizer steps of the rounds before

    @property
    def label(self) -> str:
        return f"{self.asking.label}-round{self.number}"

    @property
    def row(self) -> tuple[str, str, int]:
        return self.asking.row

    def folder(self, run: Path) -> Path:
        return self.place

    def training_images(self, data: PreparedDataset) -> ClassGroup:
        return self.shots

    def identity(self, data: PreparedDataset) -> str:
        return data.identity_of(self.shots)


def with_lengths_of(unit: Unit, values: Mapping[str, Tensor], blocks: tuple[int, int]) -> Unit:
    """The unit with the lengths of its trained values, where a search found them; else the unit itself.

    `blocks` are the numbers of blocks of the text tower and of the image tower.
    """
    if unit.search is None:
        return unit
    lengths = {
        tower: [len(values.get(f"ctx_{tower}.{block}", ())) for block in range(count)]
        for tower, count in zip(("text", "vision"), blocks, strict=True)
    }
    return replace(unit, lengths=lengths)


def descriptions_of(recipe: ClipRecipe) -> dict[tuple[str, str], Descriptions]:
    """The descriptions of every row that has some, by the names of row and dataset.

    Raises UserError as `Descriptions.read`.
    """
    return {
        (method.name, dataset.name): Descriptions.read(method.descriptions, dataset.name)
        for method in recipe.methods
        if method.descriptions is not None
        for dataset in recipe.data.datasets
    }


def units_of(recipe: ClipRecipe, described: bool = False) -> list[Unit]:
    """All units, method by method; a method without trainables has one unit per dataset, as no seed changes it.

    With `described` the units have the descriptions that rows name, as training and evaluation need them; UserError for
    files that cannot be used.
    """
    described_by = descriptions_of(recipe) if described else {}
    group: Group = "base" if recipe.data.protocol == "base_to_new" else "all"
    units = []
    for method in recipe.methods:
        for dataset in recipe.data.datasets:
            for seed in recipe.seeds if method_class(method.kind).learns else recipe.seeds[:1]:
                search, texts = recipe.search_of(method), described_by.get((method.name, dataset.name))
                groups = _groups(recipe.data, dataset)
                units.append(Unit(method, dataset, seed, group, groups, search=search, descriptions=texts))
    return units


def _groups(data: ClipDataConfig, dataset: DatasetConfig) -> tuple[tuple[str, str, Group], ...]:
    if data.protocol == "base_to_new":
        return (("base", dataset.name, "base"), ("new", dataset.name, "new"))
    if not dataset.tested:
        return ()
    if data.protocol in ("all_classes", "active"):
        return (("all", dataset.name, "all"),)
    return tuple((entry.name, entry.name, "all") for entry in (dataset, *data.targets))


def learner_of(unit: Unit, backbone: Backbone, words: Words, contexts: int) -> PromptLearner:
    """The unit's trainables with initial values from its seed; UserError when the words have too few tokens."""
    return make_learner(unit.method.kind, backbone, words, seed=unit.seed, **unit.options(contexts))


def regularisers_of(method: ClipMethodConfig, learner: PromptLearner, template: str) -> list[Regulariser]:
    """The regularisers of a row: those of the recipe, then the method's own; `template` is the dataset's."""
    found: list[Regulariser] = []
    if method.consistency is not None:
        weights = method.consistency
        found.append(Consistency(weights.text, weights.image, weights.logits, weights.templates))
    return [*found, *learner.regularisers(template)]
