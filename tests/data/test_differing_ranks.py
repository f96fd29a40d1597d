"""Prepared data on several ranks: one verifies its tables, the others have the same ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import prepare_project, recipe_on
from tests.processes import torchrun

pytestmark = [pytest.mark.gloo, pytest.mark.e2e]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_project(tmp_path_factory.mktemp("differing"), tasks=1)


def opened(project: Path, folder: Path, name: str) -> list[dict[str, Any]]:
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(recipe_on(project, folder, tasks=1).model_dump(mode="json")))
    torchrun(["-m", "tests.data.differing_ranks", str(recipe), str(folder), name], 2, limit_s=120)
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


def test_rank_0_alone_hashes_the_tables(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "data", tmp_path / "same")
    first, second = opened(project, tmp_path, "same")
    assert first["said"] == second["said"] == ""
    assert sorted(first["hashed"]) == ["index.parquet"] * 2 + ["keys.safetensors"] * 2
    assert second["hashed"] == []


def test_other_keys_on_another_rank_are_refused_on_all(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "data", tmp_path / "other")
    path = tmp_path / "other" / "T0" / "train" / "keys.safetensors"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    first, second = opened(project, tmp_path, "other")
    assert "keys.safetensors" in first["said"]
    assert "is not the file that the first rank sees" in first["said"]
    assert first["said"] == second["said"]
