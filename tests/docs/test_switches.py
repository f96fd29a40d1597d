"""The table of switches says what the recipes say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticUndefined

from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.methods.modalprompt import ModalPromptOptions

TABLE = Path(__file__).resolve().parents[2] / "docs" / "switches.md"


def rows() -> list[tuple[str, list[str], str, str]]:
    """(field, values named, official code, default) of every switch."""
    found = []
    for line in TABLE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[0].startswith("`"):
            named = re.findall(r"`([^`]+)`", cells[1])
            found += [(field, named, cells[3], cells[4]) for field in re.findall(r"`([^`]+)`", cells[0])]
    return found


def value_of(recipe: Recipe, field: str) -> Any:
    section, name = field.split(".")
    return getattr(getattr(recipe, section), name)


def same(written: str, value: Any) -> bool:
    return written == ("null" if value is None else str(value)) or (
        isinstance(value, float) and not isinstance(value, bool) and written == f"{value:g}"
    )


def test_the_table_has_the_switches() -> None:
    assert len(rows()) > 20
    assert len({field for field, *_ in rows()}) == len(rows())


@pytest.mark.parametrize(("field", "named", "official", "default"), rows(), ids=[row[0] for row in rows()])
def test_default_and_official_value_are_those_of_the_recipes(
    field: str, named: list[str], official: str, default: str
) -> None:
    section, name = field.split(".")
    group: Any = ModalPromptOptions if section == "method" else Recipe.model_fields[section].annotation
    described = group.model_fields[name]
    choices = getattr(described.annotation, "__args__", ())
    if named and all(isinstance(choice, str) for choice in choices):
        assert set(named) == set(choices)
    written = re.match(r"`([^`]+)`", default)
    if written is None:
        assert described.default is PydanticUndefined
    else:
        assert same(written[1], described.default)
    written = re.match(r"`([^`]+)`", official)
    if written is not None:
        assert same(written[1], value_of(load_recipe("coin_llava15_7b_compat"), field))
