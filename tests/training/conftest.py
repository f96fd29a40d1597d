"""The tiny model and two prepared tasks, saved once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.e2e.conftest import prepare_project


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random LLaVA with tied embeddings, as the embedded model has."""
    return tiny.save_llava(tmp_path_factory.mktemp("models") / "llava", tied=True)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and two prepared tasks."""
    return prepare_project(tmp_path_factory.mktemp("ranks"), tasks=2)
