"""Where tests find the base-to-new folders: `--data DIR` or TEST_DATA, the folder that holds base2new/."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "TEST_DATA"


def folder(config: pytest.Config) -> Path:
    """The folder base2new/; the test is skipped where it is not given."""
    given = config.getoption("--data", default=None) or os.environ.get(VARIABLE)
    if not given or not (Path(given) / "base2new").is_dir():
        pytest.skip(f"no third-party data: give --data DIR or {VARIABLE}=DIR with a folder base2new/ in it")
    return Path(given).resolve() / "base2new"
