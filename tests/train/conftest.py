"""The tiny model and two prepared tasks, saved once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.prepare import prepare
from tests import tiny, tiny_clip
from tests.e2e.conftest import recipe_on


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random LLaVA with tied embeddings, as the embedded model has."""
    return tiny.save_llava(tmp_path_factory.mktemp("models") / "llava", tied=True)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and two prepared tasks."""
    root = tmp_path_factory.mktemp("ranks")
    tiny.save_llava(root / "llava", tied=True)
    tiny_clip.save_clip(root / "clip")
    for number in range(2):
        tiny_clip.save_coin(root / "coin", f"T{number}", train=6, test=3)
    prepare(recipe_on(root, root / "unused", 2), progress=False)
    return root
