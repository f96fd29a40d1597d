"""The units of a benchmark: one method on one dataset with one seed, its learner and its regularisers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.clip.images.classes import Group
from pipeline.clip.methods import PromptLearner, make_learner, method_class
from pipeline.clip.methods.regulariser import Regulariser
from pipeline.clip.methods.regularisers import Consistency
from pipeline.clip.recipe import ClipMethodConfig, ClipRecipe
from pipeline.clip.recipe_data import ClipDataConfig, DatasetConfig
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

    def options(self, classes: int) -> dict[str, Any]:
        """The method's options when it trains on `classes` classes."""
        options = dict(self.method.options)
        if self.method.per_class:
            options["classes"] = classes
        known = inspect.signature(method_class(self.method.kind)).parameters
        further = {"template": self.dataset.description.template, "knowledge": self.method.knowledge}
        return {**{name: value for name, value in further.items() if name in known}, **options}


def units_of(recipe: ClipRecipe) -> list[Unit]:
    """All units, method by method; a method without trainables has one unit per dataset, as no seed changes it."""
    group: Group = "base" if recipe.data.protocol == "base_to_new" else "all"
    units = []
    for method in recipe.methods:
        for dataset in recipe.data.datasets:
            for seed in recipe.seeds if method_class(method.kind).learns else recipe.seeds[:1]:
                units.append(Unit(method, dataset, seed, group, _groups(recipe.data, dataset)))
    return units


def _groups(data: ClipDataConfig, dataset: DatasetConfig) -> tuple[tuple[str, str, Group], ...]:
    if data.protocol == "base_to_new":
        return (("base", dataset.name, "base"), ("new", dataset.name, "new"))
    if data.protocol == "all_classes":
        return (("all", dataset.name, "all"),)
    return tuple((entry.name, entry.name, "all") for entry in (dataset, *data.targets))


def learner_of(unit: Unit, backbone: Backbone, words: Words, classes: int) -> PromptLearner:
    """The unit's trainables with initial values from its seed; UserError when the words have too few tokens."""
    return make_learner(unit.method.kind, backbone, words, seed=unit.seed, **unit.options(classes))


def regularisers_of(method: ClipMethodConfig, learner: PromptLearner, template: str) -> list[Regulariser]:
    """The regularisers of a row: those of the recipe, then the method's own; `template` is the dataset's."""
    found: list[Regulariser] = []
    if method.consistency is not None:
        weights = method.consistency
        found.append(Consistency(weights.text, weights.image, weights.logits, weights.templates))
    return [*found, *learner.regularisers(template)]
