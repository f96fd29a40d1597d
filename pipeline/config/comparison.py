"""The section `comparison`: which methods `compare` runs on a recipe, and the settings in which they may differ."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Name, Section, each_once
from pipeline.config.method import FromRegistry
from pipeline.errors import nearest

# What a method may set for itself in `train`: how its optimizer steps. All else is the recipe's, equal for all methods:
# steps or epochs, batch, projector, data.
RATES = (
    *("lr_prompt", "lr_head", "lr_projector", "weight_decay", "betas", "eps", "schedule", "warmup", "warmup_curve"),
    "clip",
)


class ComparedMethod(Section):
    """One method of a comparison; a bare name is one with the recipe's settings."""

    name: Name = Field(description="name in tables and folders; the method's, unless `method` says another")
    method: Annotated[str, FromRegistry("methods")] | None = Field(
        None, description="the method, where `name` is not its name; so one method can be compared with itself"
    )
    options: dict[str, Any] = Field({}, description="its options, over those of the recipe's `method`")
    train: dict[str, Any] = Field(
        {}, description=f"its own {', '.join(RATES[:-1])} or {RATES[-1]}, over those of the recipe's `train`"
    )

    @field_validator("train")
    @classmethod
    def _rates_alone(cls, train: dict[str, Any]) -> dict[str, Any]:
        for name in train:
            if name not in RATES:
                raise ValueError(
                    f"'{name}' is the recipe's, equal for all methods that are compared; expected some of "
                    f"{', '.join(RATES)}.{nearest(name, RATES)}"
                )
        return train

    @property
    def method_name(self) -> str:
        """The method that is run."""
        return self.method or self.name


class ComparisonConfig(Section):
    """What `compare` runs: each of these methods with each of these seeds, otherwise as the recipe says."""

    methods: tuple[ComparedMethod, ...] = Field(
        (), description="the methods; `compare --methods a,b` chooses among them, or names others"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="the seeds; empty: the recipe's own")
    targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="ends of the names of the layers that all compared methods with low-rank updates change; null: "
        "those of each method's options, which have to be equal",
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_names(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or not isinstance(fields.get("methods"), list):
            return fields
        return {**fields, "methods": [as_entry(entry) for entry in fields["methods"]]}

    @model_validator(mode="after")
    def _each_once(self) -> ComparisonConfig:
        each_once("compared method", [entry.name for entry in self.methods], "; give one of them another `name`")
        each_once("seed", self.seeds)
        return self


def as_entry(entry: Any) -> Any:
    """A bare name as an entry; a target's colon, which no folder's name has, becomes a full stop in the name."""
    if not isinstance(entry, str):
        return entry
    return {"name": entry.replace(":", "."), "method": entry} if ":" in entry else {"name": entry}
