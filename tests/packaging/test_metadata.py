"""What installing the project asks for, and what its Makefile offers."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
from packaging.requirements import Requirement

import pipeline
from tests.processes import PROJECT


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    toml = pytest.importorskip("tomllib")  # of Python 3.11
    content: dict[str, Any] = toml.loads((PROJECT / "pyproject.toml").read_text("utf-8"))
    return content


def pinned(file: str) -> dict[str, str]:
    """The exact versions of a requirements file."""
    return dict(re.findall(r"^([\w-]+)==(.+)$", (PROJECT / file).read_text("utf-8"), re.MULTILINE))


def test_the_build_asks_for_a_setuptools_that_reads_the_licence(project: dict[str, Any]) -> None:
    """A licence as an SPDX expression is read since setuptools 77; older ones refuse the whole file."""
    assert project["project"]["license"] == "Apache-2.0"
    (least,) = re.findall(r"setuptools>=(\d+)", project["build-system"]["requires"][0])
    assert int(least) >= 77


def test_the_pinned_files_have_what_the_package_and_its_extras_ask_for(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    own = [Requirement(text) for text in extras["all"] if text.startswith("continual-prompts[")]
    assert [found.extras for found in own] == [set(extras) - {"all", "dev"}]
    asked = [*project["project"]["dependencies"]]
    asked += [text for extra in own[0].extras for text in extras[extra]]
    for file, texts in (("requirements.txt", asked), ("requirements-dev.txt", extras["dev"])):
        pins, wanted = pinned(file), {found.name: found for found in map(Requirement, texts)}
        assert set(pins) == set(wanted), file
        for name, version in pins.items():
            assert wanted[name].specifier.contains(version), f"{file}: {name}"


def test_package_changelog_and_citation_have_the_same_version() -> None:
    headings = re.findall(r"^## (\S+)", (PROJECT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert "Unreleased" not in headings[1:]
    assert not released or released[0] == pipeline.__version__
    (cited,) = re.findall(r"^version: (.+)$", (PROJECT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert cited == pipeline.__version__


def test_what_the_shown_commands_write_is_ignored() -> None:
    ignored = (PROJECT / ".gitignore").read_text("utf-8").splitlines()
    assert {"/adapter/", "/smaller/", "/scene.png", "first-steps/"} <= set(ignored)


def test_the_port_of_the_tracking_pages_can_be_chosen() -> None:
    shown = ["make", "--dry-run", "-C", str(PROJECT), "ui"]
    assert "--port 5000" in subprocess.run(shown, capture_output=True, text=True, check=True).stdout
    assert "--port 5999" in subprocess.run([*shown, "PORT=5999"], capture_output=True, text=True, check=True).stdout
