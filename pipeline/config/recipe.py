"""The recipe of a task sequence: everything that a run depends on, typed, immutable, without unknown fields."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from pipeline.config.base import FileRecipe, TrackingConfig
from pipeline.config.comparison import ComparisonConfig
from pipeline.config.data import TASK_CONTENT, DataConfig
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.given_paths import GivenPath
from pipeline.config.method import DEFAULT, MethodField, MethodOptions, method_options, of_a_record
from pipeline.config.models import KeysConfig, ModelConfig
from pipeline.config.train import AUTO, ZERO2, TrainConfig
from pipeline.data.origin import shared_or_each

# Fields that may change in a run with finished stages: what these keep for routing and for answers is made anew then.
OF_ROUTING = ("method.router", "method.unfamiliar")
OF_HEADS = ("method.answer_head",)


class Recipe(FileRecipe):
    """Everything that a run depends on: data, model, method, training and a seed."""

    filled_in: ClassVar[tuple[str, ...]] = ("name", "method", "seed")
    adopted: ClassVar[tuple[str, ...]] = (*OF_ROUTING, *OF_HEADS)

    seed: int = Field(0, ge=0, description="seed of initialisation and sample order")
    run_dir: GivenPath = Field(
        "runs/{name}-{method}-s{seed}", description="folder; {name}, {method}, {seed} are filled in"
    )
    data: DataConfig
    model: ModelConfig
    keys: KeysConfig
    method: MethodField = Field(default_factory=method_options)
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    # What `compare` reads; a run's own recipe does not have it.
    comparison: ComparisonConfig = Field(ComparisonConfig(), exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _own_keys_are_the_models(cls, fields: Any) -> Any:
        model, keys = _sections(fields, "model", "keys")
        if keys.get("kind") == "own" and "path" not in keys:
            fields = {**fields, "keys": {**keys, "path": model.get("path"), "revision": model.get("revision")}}
        return fields

    @model_validator(mode="before")
    @classmethod
    def _weights_are_whole(cls, fields: Any) -> Any:
        """`auto` of train.deepspeed is ZeRO-2 for quantised weights and compiled layers, which ZeRO-3 cannot have."""
        model, train = _sections(fields, "model", "train")
        needed = model.get("quantization", "none") != "none" or train.get("compile", "none") != "none"
        if needed and train.get("deepspeed", AUTO) == AUTO:
            fields = {**fields, "train": {**train, "deepspeed": ZERO2}}
        return fields

    @model_validator(mode="after")
    def _one_order_of_samples(self) -> Recipe:
        if self._inserts_after_the_image and self.train.length_buckets and self.train.questions_per_image > 1:
            raise ValueError(
                "with method.insertion after_image train.questions_per_image orders the samples by image and "
                "train.length_buckets by length; expected questions_per_image 1 or length_buckets false"
            )
        return self

    @model_validator(mode="after")
    def _gradients_reach_the_projector(self) -> Recipe:
        if self._inserts_after_the_image and self.train.projector == "trained":
            raise ValueError(
                "method.insertion after_image computes the image without gradients, so train.projector trained would "
                "never learn; expected train.projector frozen or another insertion"
            )
        return self

    @property
    def _inserts_after_the_image(self) -> bool:
        return getattr(self.method, "insertion", None) == "after_image"

    def data_settings(self) -> dict[str, Any]:
        """The settings that determine the content of the prepared data, without those at their defaults.

        Of tasks, their settings count but not their names, so recipes with any tasks in any order share a folder where
        all tasks are read with the same settings. `skip_bad` does not count, because it is only a limit.
        """
        data, keys = self.data, self.keys
        said = {
            task.name: task.model_dump(mode="json", include=TASK_CONTENT, exclude_defaults=True) for task in data.tasks
        }
        found = {
            "source": data.source,
            "root": os.path.normpath(data.root),
            "tasks": shared_or_each(said),
            "repeated_ids": data.repeated_ids if data.repeated_ids != "refuse" else None,
            "seed": data.seed if data.drawn else None,
            "keys": keys.model_dump(mode="json", exclude={"batch"}, exclude_defaults=True),
        }
        return {name: value for name, value in found.items() if value not in (None, {})}

    @classmethod
    def as_a_run_meant(cls, fields: Any) -> Any:
        """The fields of a run's config.yaml, completed with former defaults of fields that it lacks."""
        if not isinstance(fields, dict) or not isinstance(fields.get("data"), dict):
            return fields
        # Runs of versions that held out no samples were trained on all of them.
        completed = {**fields, "data": {"validation_share": 0.0, **fields["data"]}}
        return {**completed, "method": of_a_record(fields["method"])} if "method" in fields else completed

    def continuing(self, recorded: Any) -> Recipe:
        """The recipe for a run that was begun with the fields `recorded`: what it leaves out stays as it was there.

        That are fields whose default has changed since. A run that lacks one of them has the former default.
        """
        method = recorded.get("method") if isinstance(recorded, Mapping) else None
        if not isinstance(method, Mapping) or method.get("name", DEFAULT) != self.method.name:
            return self
        former = {**self.method.FORMERLY, **{name: method[name] for name in self.method.FORMERLY if name in method}}
        left_out = {name: former[name] for name in former if name not in self.method.model_fields_set}
        return self.model_copy(update={"method": self.method.model_copy(update=left_out)}) if left_out else self

    def adopting(self, other: MethodOptions, fields: Sequence[str]) -> Recipe:
        """The recipe with these fields of `adopted` as another one's method has them."""
        names = [field.removeprefix("method.") for field in fields]
        found = {name: getattr(other, name) for name in names if hasattr(other, name) and hasattr(self.method, name)}
        return self.model_copy(update={"method": self.method.model_copy(update=found)})

    @property
    def run_path(self) -> Path:
        """Folder of this run."""
        return Path(self.run_dir.format(name=self.name, method=self.method.name.replace(":", "."), seed=self.seed))


def _sections(fields: Any, *names: str) -> list[dict[str, Any]]:
    """These sections of a recipe before its validation; all empty where one is no mapping, which validation reports."""
    found = [fields.get(name) for name in names] if isinstance(fields, dict) else []
    given = [section for section in found if isinstance(section, dict)]
    return given if len(given) == len(names) else [{} for _ in names]
