"""A working folder with copies of what is kept, as a user has it: paths in recipes and runs are relative to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compat.kept import working_folder


@pytest.fixture
def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of one test, which the process is in."""
    monkeypatch.chdir(working_folder(tmp_path))
    return tmp_path
