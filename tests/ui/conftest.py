"""The page of one made run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ui.made import Browser, run_with_pictures


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_with_pictures(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def browser(run: Path) -> Iterator[Browser]:
    browser = Browser(run)
    yield browser
    browser.site.close()
