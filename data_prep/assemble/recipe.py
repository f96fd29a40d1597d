"""The recipe of an assembled model: where its parts come from, and how they are joined."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from pipeline.config.base import Name, Section
from pipeline.config.messages import sentence
from pipeline.errors import UserError, nearest
from pipeline.files.strict_text import load_yaml

RECIPES = Path(__file__).parent / "recipes"
Layout = Literal["transformers", "efficientnet_lite"]


class PartConfig(Section):
    """Where a part comes from: exactly one of a Python package, a repository on the Hub, and a folder."""

    package: str | None = Field(None, description="NAME==VERSION of an installed Python package, whose files are read")
    hub: str | None = Field(None, description="repository on the Hugging Face Hub")
    revision: str | None = Field(None, description="commit of the repository")
    folder: str | None = Field(None, description="local folder; a relative one starts at the recipe's")
    file: str | None = Field(
        None, description="the part's file there; none: the folder is a checkpoint of transformers"
    )
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="hash of the file")
    licence: str = Field(description="licence of the part, for the card")

    @model_validator(mode="after")
    def _one_place(self) -> PartConfig:
        given = [name for name in ("package", "hub", "folder") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of package, hub and folder, and found {' and '.join(given) or 'none'}")
        if self.package is not None and (self.package.count("==") != 1 or not self.file):
            raise ValueError("expected package: NAME==VERSION with the file in it")
        if self.sha256 is not None and not self.file:
            raise ValueError("expected a file for the sha256")
        return self

    @property
    def place(self) -> str:
        """The part's place for people."""
        return self.package or self.hub or str(self.folder)


class VisionConfig(PartConfig):
    """The vision tower and the preprocessing of its images."""

    layout: Layout = Field("transformers", description="how its weights are stored")
    image_size: int = Field(224, ge=1, description="pixels per side of its images")
    mean: float = Field(0.5, description="mean of normalised pixel values")
    deviation: float = Field(0.5, gt=0, description="their standard deviation")


class LanguageConfig(PartConfig):
    """The language model with its tokenizer and chat template."""

    system: str | None = Field(
        None, description="system sentence of conversations without one; null: what its chat template has"
    )


class AssembleRecipe(Section):
    """An assembled model."""

    name: Name = Field(description="name of the model")
    out: str = Field("models/{name}", description="folder of the checkpoint; {name} is filled in")
    vision: VisionConfig
    language: LanguageConfig
    projector: PartConfig
    image_token: str = Field("<image>", min_length=1, description="token that stands for an image's features")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="precision of the stored weights")
    note: str = Field("", description="what the card says about the model, such as what its projector was trained on")


def load_assemble_recipe(name_or_path: str) -> tuple[AssembleRecipe, Path]:
    """The recipe of that name or file, and the folder at which its relative paths start.

    Raises UserError with what was found and what was expected.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
    known = sorted(found.stem for found in RECIPES.glob("*.yaml"))
    if not path.is_file():
        raise UserError(
            f"There is no recipe '{name_or_path}' of an assembled model; expected one of {', '.join(known)}, or a YAML "
            f"file.{nearest(path.stem, known)}"
        )
    try:
        fields: Any = load_yaml(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"'{path}' is not YAML ({str(error).splitlines()[0]}).") from error
    if not isinstance(fields, dict):
        raise UserError(f"'{path}' holds a {type(fields).__name__}; expected the fields of an assembled model.")
    try:
        return AssembleRecipe.model_validate({"name": path.stem, **fields}), path.parent
    except ValidationError as error:
        raise UserError(f"recipe '{name_or_path}': {sentence(error, AssembleRecipe)}") from error
