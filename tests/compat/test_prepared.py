"""Kept prepared data is whole, and what a recipe needs without being prepared again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.__main__ import app
from tests.compat.kept import succeeded

pytestmark = pytest.mark.usefixtures("working")


@pytest.mark.parametrize("recipe", ["sequence", "projector", "benchmark"])
def test_a_recipe_finds_nothing_missing(recipe: str) -> None:
    succeeded("check", f"recipes/{recipe}.yaml")


def test_every_byte_is_verified() -> None:
    for split in sorted(path.parent for path in Path("data/sequence").rglob("dataset.json")):
        (split / "verified.json").unlink(missing_ok=True)
        done = CliRunner().invoke(app, ["verify", str(split)])
        assert done.exit_code == 0, done.output


def test_its_fingerprints_are_those_that_runs_were_trained_on() -> None:
    meta = json.loads(Path("runs/sequence/stages/01-T0/meta.json").read_text("utf-8"))
    described = json.loads(Path("data/sequence/T0/train/dataset.json").read_text("utf-8"))
    assert meta["data"] == {"T0": described["fingerprint"]}
