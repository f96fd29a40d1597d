"""The recipe of a task sequence: everything that a run depends on, typed, immutable, without unknown fields."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from pipeline.config.base import FileRecipe, TrackingConfig
from pipeline.config.data import TASK_CONTENT, DataConfig
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.method import MethodField, method_options, of_a_record
from pipeline.config.models import KeysConfig, ModelConfig
from pipeline.config.train import TrainConfig
from pipeline.data.origin import shared_or_each
from pipeline.files.paths import GivenPath


class Recipe(FileRecipe):
    """Everything that a run depends on: data, model, method, training and a seed."""

    filled_in: ClassVar[tuple[str, ...]] = ("name", "method", "seed")

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

    @property
    def run_path(self) -> Path:
        """Folder of this run."""
        return Path(self.run_dir.format(name=self.name, method=self.method.name.replace(":", "."), seed=self.seed))
