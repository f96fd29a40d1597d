"""The site has every page once, in the order of its sections, and is built strictly: no dead link, no dead anchor."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.processes import PROJECT

SECTIONS = ["Home", "Concepts", "Tutorials", "How-to", "Reference", "Explanation", "Troubleshooting", "FAQ"]
FILES = ("README.md", "mkdocs.yml", "docs", "examples", "data_prep/nano/README.md")


def settings() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((PROJECT / "mkdocs.yml").read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_links", PROJECT / "docs" / "site_links.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_has_one_place_and_the_sections_their_order() -> None:
    sections = [next(iter(entry.items())) for entry in settings()["nav"]]
    assert [title for title, _ in sections] == SECTIONS
    pages = [page for _, inside in sections for page in (inside if isinstance(inside, list) else [inside])]
    assert sorted(pages) == sorted(["index.md", *(path.name for path in (PROJECT / "docs").glob("*.md"))])


def test_links_of_a_page_are_those_of_the_site(hook: ModuleType) -> None:
    def rewritten(file: str, target: str) -> str:
        found: str = hook.rewritten(file, f"see [it]({target})")
        return found

    assert rewritten("README.md", "docs/models.md#a-b") == "see [it](models.md#a-b)"
    assert rewritten("README.md", "examples/first_steps.ipynb") == "see [it](source/examples/first_steps.ipynb)"
    assert rewritten("docs/results.md", "../README.md#x") == "see [it](index.md#x)"
    assert rewritten("docs/results.md", "#below") == "see [it](#below)"
    assert rewritten("docs/results.md", "https://example.org/a") == "see [it](https://example.org/a)"
    assert rewritten("data_prep/nano/README.md", "../../docs/demo-matrix.png") == "see [it](../../../demo-matrix.png)"


def build(project: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_site_is_built_strictly_and_a_dead_link_ends_it(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    site, copy = tmp_path / "site", tmp_path / "copy"
    done = build(PROJECT, site)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    home = (site / "index.html").read_text("utf-8")
    for link in re.findall(r'(?:href|src)="(?!https?:|#|\.\"|mailto:)([^"#]+)', home):
        assert (site / link).exists(), link
    assert "source/examples/first_steps.ipynb" in home
    for name in FILES:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (PROJECT / name).is_dir() else shutil.copy)(PROJECT / name, copy / name)
    page = copy / "docs" / "results.md"
    text = page.read_text("utf-8")
    for dead, said in (
        ("![it](gone.png)", "gone.png"),
        ("[it](models.md#gone)", "#gone"),
        ("[it](../gone.py)", "gone.py"),
    ):
        page.write_text(f"{text}\n{dead}\n", encoding="utf-8")
        done = build(copy, tmp_path / "other")
        assert done.returncode != 0 and said in done.stderr, dead
