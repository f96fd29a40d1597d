"""The API reference is made of every module's docstrings, without a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.paths import PROJECT


@pytest.mark.slow
@pytest.mark.e2e
def test_every_module_has_a_page_and_no_warning_is_given(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    command = ["make", "docs", f"VENV={sys.prefix}", f"DOCS={tmp_path}", f"SITE={tmp_path / 'site'}"]
    made = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=1200)
    assert made.returncode == 0, made.stderr
    assert "warn" not in made.stderr.lower(), made.stderr[:2000]
    for package in ("pipeline", "data_prep"):
        for file in (PROJECT / package).rglob("*.py"):
            module = file.relative_to(PROJECT).with_suffix("")
            if module.name == "__main__":
                continue  # what runs is no interface
            if module.name.startswith("lmms_"):
                continue  # a plugin, which only the program imports whose package it needs
            page = module.parent if module.name == "__init__" else module
            assert (tmp_path / page).with_suffix(".html").is_file(), module
    assert (tmp_path / "site" / "troubleshooting.html").is_file()
    assert "Weighted mean of the cosines" in (tmp_path / "pipeline/prompts/routers/mean.html").read_text("utf-8")
