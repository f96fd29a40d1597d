"""What a row of a benchmark says about descriptions of its classes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline.config.base import Section
from pipeline.config.given_paths import GivenPath

Mode = Literal["features", "logits"]
DATASET = "{dataset}"  # in the file's path: the name of the dataset


class DescriptionsConfig(Section):
    """Texts that describe each class, which stand beside its name in place of one text (docs/design.md 5.15)."""

    file: GivenPath = Field(
        description="JSON file of class names with a list of descriptions each; {dataset} is filled in"
    )
    mode: Mode = Field(
        "features", description="features: a class's text features are averaged; logits: its predictions are"
    )

    def path(self, dataset: str) -> Path:
        """The file of a dataset."""
        return Path(self.file.replace(DATASET, dataset))


def refuse_descriptions(name: str, found: DescriptionsConfig | None, compared: bool) -> None:
    """Raise ValueError for descriptions whose logits are averaged in a row that compares text features of classes.

    Args:
        name: the row's name.
        found: its descriptions.
        compared: whether a term of its loss compares text features of classes with those of the frozen model.
    """
    if compared and found is not None and found.mode == "logits":
        raise ValueError(
            f"{name} compares the text feature of a class with that of the frozen model, and with "
            "descriptions.mode: logits a class has several; set the mode to features"
        )
