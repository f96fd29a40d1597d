"""Kept recipes load and mean what they meant: those of runs, those that ship, and two in which every field is set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.compat.inner import load_any, recipe_names
from tests.compat.kept import KEPT, assert_contains

# Recipes held these for every method, although only this one reads them; they are left out of the others' by now.
OF_MODALPROMPT = ("k", "selection", "gate", "earlier_gates", "image_weight", "prototype_weight")
# Whose selection has changed since: a share of the best probability in place of a gate of similarities.
OTHER_GATE = ("nano", "real6_nano")
# Benchmarks that have rows behind its former ones.
MORE_ROWS = ("base2new_nano", "base2new_folders")
RESOLVED = sorted((KEPT / "resolved").glob("*.yaml"))
SHIPPED = [path.stem for path in RESOLVED if not (KEPT / "recipes" / path.name).is_file()]


def meaning(path: Path) -> Any:
    """The fields of a kept recipe, without the options that its method never read."""
    fields = yaml.safe_load(path.read_text("utf-8"))
    if fields.get("method", {}).get("name", "modalprompt") != "modalprompt":
        fields["method"] = {name: value for name, value in fields["method"].items() if name not in OF_MODALPROMPT}
    return fields


@pytest.mark.parametrize("path", RESOLVED, ids=[path.stem for path in RESOLVED])
def test_a_resolved_recipe_loads_and_is_written_as_it_was(path: Path, tmp_path: Path) -> None:
    load_any(path).dump_yaml(tmp_path / "again.yaml")
    assert_contains(yaml.safe_load((tmp_path / "again.yaml").read_text("utf-8")), meaning(path))


@pytest.mark.parametrize("path", RESOLVED, ids=[path.stem for path in RESOLVED])
def test_a_recipe_resolves_to_what_it_did(path: Path) -> None:
    source = path.stem if path.stem in SHIPPED else KEPT / "recipes" / path.name
    expected = meaning(path)
    if path.stem in OTHER_GATE:
        expected["method"] |= {"gate": None, "share": 0.5}
    found = load_any(source).model_dump(mode="json")
    if path.stem in MORE_ROWS:
        found["methods"] = found["methods"][: len(expected["methods"])]
    assert_contains(found, expected)


def test_every_shipped_recipe_of_then_ships_now() -> None:
    assert len(SHIPPED) >= 13
    assert set(SHIPPED) <= set(recipe_names())
