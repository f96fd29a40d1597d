"""The folder of one made run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sequence.made import two_stages


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return two_stages(tmp_path / "run")
