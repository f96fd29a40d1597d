"""Common parts of all kinds of recipes: sections, names, settings of the training loop, tracking, the recipe's file."""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.config.given_paths import GivenPath, GivenUri
from pipeline.data.origin import folder_label, settings_hash
from pipeline.files.atomic import replacing
from pipeline.files.passwords import masked

# Default folder of prepared data; {name} and {settings} are filled in. The latter depends only on settings that
# determine the data's content, so recipes share a folder exactly where their data is the same.
PREPARED = "data/prepared/{settings}"

SETTINGS_MARK = "{settings}"

# A name becomes a folder and a part of MLflow's metric names, which limit its letters and length.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}$"
NAME_LETTERS = "letters, digits, '_', '-' and '.', a letter or digit first, at most 100"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class Section(BaseModel):
    """A group of fields: immutable, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def each_once(what: str, names: Iterable[object], advice: str = "") -> None:
    """Raise ValueError that lists the duplicates in `names`, the names of a `what`, followed by `advice`."""
    listed = [str(name) for name in names]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise ValueError(f"expected every {what} once, and {', '.join(twice)} stands there more often{advice}")


class LoopConfig(Section):
    """Settings of the training loop that do not change what it computes: logs, processes, checkpoints."""

    log_every: int = Field(10, ge=1, description="steps between two log lines")
    workers: int = Field(0, ge=0, description="loader processes per rank")
    copy_ahead: bool = Field(
        False,
        description="true: on GPUs a step's batches are copied from pinned memory by a stream of their own while the "
        "step before computes, which takes the memory of one more batch; nothing on CPUs",
    )
    deepspeed: GivenPath = Field(
        "ds_configs/zero3.json", description="DeepSpeed file; batch, precision, clipping stay here"
    )
    processes: int | None = Field(None, ge=1, description="ranks a plain `run` starts; null: one per GPU, 1 without")
    save_minutes: float | None = Field(
        10, gt=0, description="minutes between two checkpoints inside a stage or unit; null: only as save_steps says"
    )
    save_steps: int | None = Field(None, ge=1, description="steps between two such checkpoints; null: by time only")
    keep: int = Field(2, ge=1, description="checkpoints kept of a stage or unit in progress; finished ones always stay")
    watchdog_s: float | None = Field(
        900, gt=0, description="seconds without progress on any rank after which a job ends; null: watchdog off"
    )


class TrackingConfig(Section):
    """MLflow, and curves for TensorBoard and Weights & Biases beside it."""

    enabled: bool = Field(True, description="false: nothing is sent to MLflow")
    uri: GivenUri | None = Field(None, description="tracking server; null: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db")
    experiment: str | None = Field(None, description="experiment; null: the recipe's name")
    registry: bool | Literal["always"] = Field(
        True,
        description="true: register a finished run's adapter as a version of a model where its `last` is above that of "
        "every version with the same tasks; always: register every finished run's; false: none",
    )
    tensorboard: bool = Field(
        False, description="true: the curves as event files, in `tensorboard` of the run's folder"
    )
    wandb: bool = Field(
        False, description="true: the curves to Weights & Biases, offline where no key is known or WANDB_MODE says so"
    )
    wandb_project: str | None = Field(None, description="its project; null: the experiment, else the recipe's name")

    @property
    def extras(self) -> tuple[str, ...]:
        """The optional dependencies (extras) that tracking needs."""
        needed = {"track": self.enabled, "tensorboard": self.tensorboard, "wandb": self.wandb}
        return tuple(extra for extra, used in needed.items() if used)


class FileRecipe(Section):
    """The base of all kinds of recipes: a name, the run's folder, and reading and writing it as YAML."""

    filled_in: ClassVar[tuple[str, ...]] = ("name",)  # placeholders in run_dir
    # Fields that may change in the middle of a run, which then makes anew what depends on them.
    adopted: ClassVar[tuple[str, ...]] = ()

    name: Name = Field(description="name of the recipe")
    run_dir: GivenPath = Field("runs/{name}", description="folder of the run; {name} is filled in")

    @field_validator("run_dir")
    @classmethod
    def _known_placeholders(cls, run_dir: str) -> str:
        known = [f"{{{name}}}" for name in cls.filled_in]
        expected = " and ".join(filter(None, [", ".join(known[:-1]), known[-1]]))
        try:
            used = {field for _, field, _, _ in string.Formatter().parse(run_dir) if field is not None}
        except ValueError as error:
            raise ValueError(f"expected a path with {expected}, and this has {error}") from error
        if used - set(cls.filled_in):
            raise ValueError(f"expected a path in which only {expected} {'are' if known[1:] else 'is'} filled in")
        return run_dir

    @model_validator(mode="before")
    @classmethod
    def _fill_prepared(cls, fields: Any) -> Any:
        # Filled in at validation, so that `data.prepared` is a plain path wherever it is used.
        if isinstance(fields, dict) and isinstance(fields.get("data"), dict) and isinstance(fields.get("name"), str):
            prepared = fields["data"].get("prepared", PREPARED)
            if isinstance(prepared, str):
                filled = prepared.replace("{name}", fields["name"])
                fields = {**fields, "data": {**fields["data"], "prepared": filled}}
        return fields

    @model_validator(mode="after")
    def _fill_settings(self) -> FileRecipe:
        data = getattr(self, "data", None)
        if data is not None and SETTINGS_MARK in data.prepared:
            filled = data.prepared.replace(SETTINGS_MARK, self.settings_name())
            object.__setattr__(self, "data", data.model_copy(update={"prepared": filled}))
        return self

    def settings_name(self) -> str:
        """The value of {settings} in data.prepared: the last part of the root, and a hash of `data_settings`."""
        settings = self.data_settings()
        return f"{folder_label(settings.get('root', ''))}-{settings_hash(settings)}"

    def data_settings(self) -> dict[str, Any]:
        """The settings that determine the content of the prepared data, without those at their defaults."""
        return {}

    @classmethod
    def as_a_run_meant(cls, fields: Any) -> Any:
        """The fields of a run's config.yaml, completed with former defaults of fields that it lacks."""
        return fields

    def continuing(self, recorded: Any) -> FileRecipe:
        """The recipe for a run that was begun with the fields `recorded`: what it leaves out stays as it was there."""
        return self

    @property
    def run_path(self) -> Path:
        """Folder of the run."""
        return Path(self.run_dir.format(name=self.name))

    def dump_yaml(self, path: Path) -> None:
        """Write the resolved recipe atomically; reading the file gives an equal recipe.

        Except for what is not a single run's (a section `comparison`), and for a password in `tracking.uri`, which is
        masked because run folders are shared (see `pipeline.tracking.store.tracking_uri`).
        """
        fields = self.model_dump(mode="json")
        tracking = fields.get("tracking")
        if isinstance(tracking, dict) and isinstance(tracking.get("uri"), str):
            tracking["uri"] = masked(tracking["uri"])
        with replacing(path) as temporary:
            text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
            temporary.write_text(text, encoding="utf-8")
