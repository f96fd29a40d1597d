"""The page of recipe fields says what the recipes take."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from pipeline.cli.recipe_docs import page
from pipeline.clip.recipe import ClipRecipe
from pipeline.config.messages import model_in, variants_of
from pipeline.config.paths import PROJECT
from pipeline.config.recipe import Recipe


def fields(model: type[BaseModel]) -> list[tuple[str, str | None]]:
    """Name and description of every field that is no group, of all groups."""
    found = []
    for name, info in model.model_fields.items():
        inner = model_in(info.annotation)
        for group in (inner, *variants_of(inner).values()) if inner is not None else ():
            found += fields(group)
        found += [(name, info.description)] if inner is None else []
    return found


def test_the_page_is_up_to_date() -> None:
    shown = (PROJECT / "docs" / "recipes.md").read_text("utf-8")
    assert shown == page(), "write it with: python -m pipeline.recipe_docs > docs/recipes.md"


@pytest.mark.parametrize("recipe", [Recipe, ClipRecipe], ids=lambda recipe: recipe.__name__)
def test_every_field_is_described_and_on_the_page(recipe: type[BaseModel]) -> None:
    text = page()
    for name, description in fields(recipe):
        assert description, name
        assert f"| `{name}` |" in text


def test_the_page_says_choices_bounds_and_defaults() -> None:
    rows = page().splitlines()
    for row in (
        "| `name` | `modalprompt`, `sequential`, `independent`, `joint`, `zero_shot`, ",
        "| `image_weight` | number from 0 to 1 | `0.5` |",
        "| `lr_prompt` | number above 0 | required |",
        "| `gate` | number from 0, null | `null` |",
        "| `betas` | list of 2: number from 0 below 1 | `[0.9, 0.999]` |",
    ):
        assert any(line.startswith(row) for line in rows), row
