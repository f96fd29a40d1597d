"""One tiny checkpoint per architecture, saved and loaded once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.models import ModelConfig
from tests.backbones.tiny_families import FAMILIES


@pytest.fixture(scope="session", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one architecture's checkpoint."""
    folder = tmp_path_factory.mktemp("families") / request.param
    folder.mkdir()
    return FAMILIES[request.param](folder)


@pytest.fixture(scope="session")
def lmm(checkpoint: Path) -> LMM:
    """That checkpoint, loaded as a run loads it."""
    return load_lmm(ModelConfig(path=str(checkpoint), max_length=512))
