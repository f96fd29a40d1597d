from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.recipe import Recipe
from tests.tiny_clip import picture, save_clip, save_coin


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def other_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("other-clip"), seed=1)


@pytest.fixture
def recipe(tmp_path: Path, clip: Path) -> Callable[..., Recipe]:
    """Builds a recipe for one CoIN task of 7 training and 5 test samples in shards of three."""
    save_coin(tmp_path / "coin")

    def build(keys: dict[str, Any] | None = None, tasks: list[dict[str, Any]] | None = None, **data: Any) -> Recipe:
        fields: dict[str, Any] = {
            "name": "tiny",
            "data": {
                "source": "coin",
                "root": str(tmp_path / "coin"),
                "prepared": str(tmp_path / "prepared"),
                "tasks": tasks or [{"name": "Shapes"}],
                "shard_samples": 3,
                **data,
            },
            "model": {"path": "unused"},
            "keys": {"path": str(clip), "batch": 2, **(keys or {})},
            "train": {"lr_prompt": 1e-3, "lr_head": 1e-3},
        }
        return Recipe.model_validate(fields)

    return build


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of five pictures, 0.png to 4.png."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(picture(number))
    return folder
