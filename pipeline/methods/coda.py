"""CODA-Prompt (arXiv 2211.13218): components of all tasks, summed to one prefix per layer by a sample's query."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.method import Choice, MethodOptions
from pipeline.methods.base import Method


class CodaOptions(MethodOptions):
    """The components that a task adds, and how far they are kept orthogonal."""

    TRAINING_ONLY = frozenset({"ortho"})

    components: int = Field(10, ge=1, description="components that each task adds")
    component_length: int = Field(8, ge=1, description="keys and values of the prefix that they are summed to")
    layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="layers with a prefix; null: the first 5/12, as 0 to 4 of 12"
    )
    ortho: float = Field(
        0.1, ge=0, description="weight of the term that keeps components, keys and attentions orthogonal"
    )


class Coda(Method):
    """Components of a task are trained beside all earlier ones, which do not change; answers do, for all are summed."""

    Options = CodaOptions
    part = "components"
    terms: tuple[Choice, ...] = ("orthogonal",)
    rule = "all"
