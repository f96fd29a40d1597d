"""The recipe of a CLIP benchmark: prompt methods, datasets and seeds, and the settings of their training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.clip.methods import PromptLearner, method_class, refuse_options
from pipeline.clip.recipe_active import ActiveConfig, AskingConfig, refuse_missing_labels
from pipeline.clip.recipe_data import DATASET_CONTENT, UNLABELLED_CONTENT, ClipDataConfig, DatasetConfig
from pipeline.clip.recipe_descriptions import refuse_descriptions
from pipeline.clip.recipe_search import SearchConfig
from pipeline.clip.templates import PROMPTSRC
from pipeline.clip.towers.text import MARK
from pipeline.config import registry
from pipeline.config.base import FileRecipe, LoopConfig, Name, Section, TrackingConfig, each_once
from pipeline.config.given_paths import GivenPath
from pipeline.config.messages import sentence
from pipeline.config.paths import locate
from pipeline.config.yaml_file import apply_overrides, find_recipe, read_recipe
from pipeline.errors import UserError, nearest

KIND = "clip"  # the value of a recipe file's field `kind`


class ClipModelConfig(Section):
    """The frozen CLIP or SigLIP."""

    path: GivenPath = Field(description="Hugging Face id, or folder of a checkpoint")
    revision: str | None = Field(None, description="commit of the Hugging Face repository")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of the frozen weights and the step")
    text_chunk: int | None = Field(
        None,
        ge=1,
        description="texts per pass of the text tower, recomputed in the backward pass to save memory; null: all",
    )

    @property
    def location(self) -> str:
        """The checkpoint's folder or Hub id; see `locate`."""
        return locate(self.path)


class ConsistencyConfig(Section):
    """PromptSRC's three terms of the loss (docs/design.md 5.9)."""

    text: float = Field(25.0, ge=0, description="weight of the L1 distance between learned and frozen text features")
    image: float = Field(10.0, ge=0, description="weight of the L1 distance between learned and frozen image features")
    logits: float = Field(1.0, ge=0, description="weight of the KL divergence between learned and frozen predictions")
    templates: tuple[str, ...] = Field(
        PROMPTSRC,
        min_length=1,
        description="templates whose frozen text features are averaged; default: the published 60",
    )


class AverageConfig(Section):
    """Gaussian weight averaging over epochs (docs/design.md 5.9)."""

    mean: float = Field(15.0, description="epoch with the largest weight")
    deviation: float = Field(1.0, gt=0, description="standard deviation of the weights, in epochs")


class ClipTrainConfig(LoopConfig):
    """Optimisation as in the published runs: SGD, one learning rate per epoch, whole batches only."""

    epochs: int = Field(5, ge=1, description="passes over the few-shot images, warm-up included")
    global_batch: int = Field(4, ge=1, description="images per optimizer step, over all ranks")
    micro_batch: int | None = Field(None, ge=1, description="images per rank and forward; null: no accumulation")
    lr: float = Field(0.0035, gt=0, description="learning rate after the warm-up")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum")
    weight_decay: float = Field(5e-4, ge=0, description="SGD's weight decay, on every trainable")
    warmup_epochs: int = Field(1, ge=0, description="first epochs, with the constant learning rate 1e-5")
    clip: float | None = Field(None, gt=0, description="largest gradient norm; null: no clipping")
    augment: Literal["crop_flip", "none"] = Field(
        "crop_flip", description="crop_flip: random resized crop and horizontal flip; none: as in evaluation"
    )
    cache_images: bool = Field(
        True,
        description="compute image features once, for methods without image prompts and where augment is none",
    )
    deepspeed: GivenPath = Field(
        "ds_configs/zero2.json", description="DeepSpeed file; batch size, precision and clipping are set in the recipe"
    )


# Fields that a method cannot override: ranks and watchdog are started once, before the first method is trained.
_OF_ALL_METHODS = ("deepspeed", "processes", "save_minutes", "save_steps", "keep", "watchdog_s")


class ClipMethodConfig(AskingConfig):
    """One row of the benchmark: a method, its options, and its overrides of the training settings."""

    name: Name = Field(description="the row's name in tables and folders")
    method: str | None = Field(None, description="the method, where the row has another name")
    options: dict[str, Any] = Field({}, description="options of the method, such as length or depth")
    per_class: bool = Field(False, description="true: coop learns class-specific contexts")
    consistency: ConsistencyConfig | None = Field(
        None, description="PromptSRC's terms, which penalise the distance to the frozen model; null: none"
    )
    knowledge: float = Field(
        8.0, ge=0, description="kgcoop: weight of the distance to the text features of the hand-written templates"
    )
    average: AverageConfig | None = Field(
        None, description="Gaussian average of the prompts over the epochs; null: the last epoch's prompts"
    )
    search: SearchConfig | None = Field(
        None, description="dpl: find the lengths of its prompts before each unit's training; null: they are options"
    )
    train: dict[str, Any] = Field({}, description="overrides of train for this method")
    train_on: dict[str, dict[str, Any]] = Field(
        {}, description="overrides of train for this method on one dataset, by the dataset's name"
    )

    @property
    def kind(self) -> str:
        """The name of the method that the row trains."""
        return self.method or self.name

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, entry: Any) -> Any:
        return {"name": entry} if isinstance(entry, str) else entry

    @model_validator(mode="after")
    def _options_of_the_method(self) -> ClipMethodConfig:
        if not registry.knows("clip_methods", self.kind):
            raise ValueError(registry.unknown("clip_methods", self.kind))
        try:
            learner = method_class(self.kind)
            refuse_options(self.kind, self.options, hidden=("classes",))  # `per_class` sets it from the dataset
            if self.search is None:
                learner.refuse_values(self.options)
        except UserError as error:
            raise ValueError(str(error)) from None
        template = self.options.get("template")
        if template is not None and MARK not in template:
            raise ValueError(f"the template '{template}' needs {MARK} where the class name goes")
        if self.per_class and not learner.takes_classes:
            able = ", ".join(name for name in registry.BUILT_IN["clip_methods"] if method_class(name).takes_classes)
            raise ValueError(f"per_class belongs to {able}; {self.kind} learns one context for all classes")
        if self.search is not None:
            self._search_belongs(learner)
        if not learner.learns and (self.consistency or self.average):
            raise ValueError(f"{self.kind} learns nothing that could be regularised or averaged")
        return self

    def _search_belongs(self, learner: type[PromptLearner]) -> None:
        """Raise ValueError for a search of a method whose lengths no search finds, or beside given lengths."""
        if not learner.searches:
            able = ", ".join(name for name in registry.BUILT_IN["clip_methods"] if method_class(name).searches)
            raise ValueError(f"search belongs to {able}; the prompt lengths of {self.kind} are its options")
        given = [name for name in ("text", "vision") if name in self.options]
        if given:
            raise ValueError(
                f"{self.name} has a search and the lengths that it would find (options.{given[0]}); keep one of them"
            )


def search_among(methods: Sequence[ClipMethodConfig], method: ClipMethodConfig) -> SearchConfig | None:
    """See `ClipRecipe.search_of`."""
    like = None if method.search is None else method.search.like
    if like is None:
        return method.search
    names = [row.name for row in methods]
    if like not in names:
        raise ValueError(
            f"methods.{method.name}.search.like names no row; the rows are {', '.join(names)}.{nearest(like, names)}"
        )
    other = methods[names.index(like)]
    if names.index(like) >= names.index(method.name) or other.search is None:
        raise ValueError(
            f"methods.{method.name}.search.like is {like}, which "
            f"{'has no search' if other.search is None else 'comes later or is the row itself'}; name an earlier "
            "row with a search of its own"
        )
    return search_among(methods, other)


class ClipRecipe(FileRecipe):
    """A benchmark: every method on every dataset with every seed."""

    kind: Literal["clip"] = Field(description="distinguishes a benchmark recipe from one of a task sequence")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (1, 2, 3), min_length=1, description="each seed draws its own few-shot images, initial prompts and sample order"
    )
    data: ClipDataConfig
    model: ClipModelConfig
    active: ActiveConfig | None = Field(
        None, description="protocol active: how labels are asked for; null: with the defaults"
    )
    methods: tuple[ClipMethodConfig, ...] = Field(min_length=1, description="the rows of the benchmark, in this order")
    train: ClipTrainConfig = ClipTrainConfig()
    evaluate_batch: int = Field(100, ge=1, description="images per forward pass in evaluation, per rank")
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _rows_fit_the_protocol(self) -> ClipRecipe:
        advice = "; give the second one another name and its method in `method`"
        each_once("method", (method.name for method in self.methods), advice)
        each_once("seed", self.seeds)
        active = self.data.protocol == "active"
        if self.active is not None and not active:
            raise ValueError("the section active belongs to the protocol active; set data.protocol to active")
        for method in self.methods:
            learner = method_class(method.kind)
            method.refuse_contradictions(method.name, learner.learns, learner.per_image, active)
            if method.per_class and self.data.protocol not in ("all_classes", "active"):
                raise ValueError(
                    f"{method.name} learns a context for each class, which the other classes of {self.data.protocol} "
                    "have none of; set data.protocol to all_classes, or per_class to false"
                )
            for dataset in (None, *method.train_on):
                self.train_of(method, dataset)
            compares = bool(method.consistency) or learner.regularisers is not PromptLearner.regularisers
            refuse_descriptions(method.name, method.descriptions, compares)
            if active:
                refuse_missing_labels(self.active or ActiveConfig(), method, method.name, self.data, learner.learns)
            if self.search_of(method) is not None and active:
                raise ValueError(
                    f"methods.{method.name}.search needs the few-shot images of a seed, which the protocol active has "
                    "none of; give the lengths in options"
                )
        return self

    def data_settings(self) -> dict[str, Any]:
        """The settings that determine the content of the prepared data; those at their defaults are left out.

        Seeds are not among them: a prepared dataset holds the few-shot rows of every seed it was prepared for.
        """
        data = self.data
        content = DATASET_CONTENT | UNLABELLED_CONTENT
        said = {
            entry.name: entry.model_dump(mode="json", include=content, exclude_defaults=True)
            for entry in (*data.datasets, *data.targets)
        }
        found = {
            "kind": self.kind,
            "source": data.source,
            "root": os.path.normpath(data.root),
            "shots": data.shots or "all",
            "fewer": data.fewer if data.fewer != "refuse" else None,
            "datasets": {name: fields for name, fields in sorted(said.items()) if fields},
            "seed": data.seed if data.source == "generated" else None,
        }
        return {name: value for name, value in found.items() if value not in (None, {})}

    def search_of(self, method: ClipMethodConfig) -> SearchConfig | None:
        """The settings of a row's search, those of another row where it is `like` one; None where it has none.

        ValueError where `like` names no row, not an earlier one, or one without a search.
        """
        return search_among(self.methods, method)

    @property
    def searches(self) -> bool:
        """Whether some row has a search, which needs validation images."""
        return any(method.search is not None for method in self.methods)

    def template_of(self, dataset: str) -> str:
        """The text template of one of the datasets."""
        return next(entry.description.template for entry, _ in datasets_of(self) if entry.name == dataset)

    def train_of(self, method: ClipMethodConfig, dataset: str | None = None) -> ClipTrainConfig:
        """The training settings of a method (on one dataset); ValueError for an override of an unknown field."""
        own = method.train | method.train_on.get(dataset or "", {})
        for field in own:
            if field not in ClipTrainConfig.model_fields or field in _OF_ALL_METHODS:
                fields = [name for name in ClipTrainConfig.model_fields if name not in _OF_ALL_METHODS]
                raise ValueError(
                    f"methods.{method.name}.train has no field '{field}'; it may set {', '.join(fields)}."
                    + nearest(field, fields)
                )
        try:
            return ClipTrainConfig.model_validate({**self.train.model_dump(), **own})
        except ValidationError as error:
            raise ValueError(f"methods.{method.name}.train: {sentence(error, ClipTrainConfig)}") from None


def clip_recipe(fields: dict[str, Any], called: str) -> ClipRecipe:
    """The recipe with these fields, called `called` in errors; UserError, one sentence that names each wrong field."""
    try:
        return ClipRecipe.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"recipe '{called}': {sentence(error, ClipRecipe)}") from error


def datasets_of(recipe: ClipRecipe) -> Iterable[tuple[DatasetConfig, bool]]:
    """Every dataset of a recipe, and whether it is trained on."""
    yield from ((entry, True) for entry in recipe.data.datasets)
    yield from ((entry, False) for entry in recipe.data.targets)


def load_benchmark(name: str, overrides: Iterable[str] = ()) -> ClipRecipe:
    """The benchmark recipe of that name or file with overrides; UserError, one sentence that names each wrong field."""
    return clip_recipe(apply_overrides(read_recipe(find_recipe(name)), overrides), name)
