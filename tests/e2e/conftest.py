"""A prepared sequence of small tasks on tiny random models, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.recipe import Recipe
from tests import tiny, tiny_clip
from tests.training.worlds import make_recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and twelve tasks in CoIN layout, one sample in four without an image."""
    return prepare_project(tmp_path_factory.mktemp("sequence"), tasks=12)


@pytest.fixture
def make(prepared: Path, tmp_path: Path) -> MakeRecipe:
    """Recipes on the prepared tasks whose runs live in this test's own folder."""
    return lambda **changes: recipe_on(prepared, tmp_path, **changes)


def prepare_project(root: Path, tasks: int, train: int = 6, test: int = 4) -> Path:
    """Save tiny models and so many tasks in a folder, prepare the tasks, and return the folder."""
    tiny.save_llava(root / "llava", tied=True)
    tiny_clip.save_clip(root / "clip")
    for number in range(tasks):
        tiny_clip.save_coin(root / "coin", f"T{number}", train=train, test=test)
    from data_prep.prepare import prepare

    prepare(recipe_on(root, root / "unused", tasks), progress=False)
    return root


def recipe_on(root: Path, runs: Path, tasks: int = 3, **changes: Any) -> Recipe:
    """A recipe on the first `tasks` tasks; 2 steps per stage, without ZeRO unless changed."""
    fields = {
        "data": {
            "source": "coin",
            "root": str(root / "coin"),
            "prepared": str(root / "data"),
            "tasks": [{"name": f"T{number}", "max_new_tokens": 3} for number in range(tasks)],
        },
        "keys": {"path": str(root / "clip")},
        "run_dir": str(runs / "{method}-{seed}"),
        "train__steps": 2,
        "train__deepspeed": "ds_configs/zero0.json",
    }
    return make_recipe(root / "llava", **{**fields, **changes})
