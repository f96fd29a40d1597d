"""What a tag publishes: one version everywhere, the wheel and the source archive, without a stored secret."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pipeline
from tests.packaging.installed import SOURCES, build_wheel
from tests.packaging.test_workflow import GITHUB, load
from tests.processes import PROJECT

SCRIPT = PROJECT / ".ci" / "release.py"
FILES = ("pipeline/__init__.py", "CITATION.cff", "CHANGELOG.md")
TAG = f"v{pipeline.__version__}"


@pytest.fixture
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Files of the project as a release has them: nothing is unreleased."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / name, tmp_path / name)
    path = tmp_path / "CHANGELOG.md"
    path.write_text(re.sub(r"^## Unreleased\n(.*?)(?=^## )", "", path.read_text("utf-8"), flags=re.M | re.S), "utf-8")
    return tmp_path


def test_a_release_names_one_version(release: ModuleType, project: Path) -> None:
    assert release.problems(TAG, project) == []
    notes = release.notes(project)
    assert notes and notes in (project / "CHANGELOG.md").read_text("utf-8") and "\n## " not in notes


@pytest.mark.parametrize("file", FILES)
def test_another_version_is_refused(file: str, release: ModuleType, project: Path) -> None:
    text = (project / file).read_text("utf-8")
    assert pipeline.__version__ in text
    (project / file).write_text(text.replace(pipeline.__version__, "99.0.0"), "utf-8")
    (said,) = release.problems(TAG, project)
    assert file in said and said.endswith(f" is 99.0.0; expected {pipeline.__version__}, as the tag says.")


def test_unreleased_lines_are_refused(release: ModuleType, project: Path) -> None:
    path = project / "CHANGELOG.md"
    path.write_text("# Changelog\n\n## Unreleased\n\n* New.\n\n" + path.read_text("utf-8"), "utf-8")
    (said,) = release.problems(TAG, project)
    assert said.startswith("the first heading of CHANGELOG.md is Unreleased; expected ")


@pytest.mark.parametrize("words", [["1.0"], ["v1"], ["v1.0.0-rc1"], []])
def test_what_is_no_tag_ends_the_command(words: list[str]) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and done.stdout == ""
    assert "expected vMAJOR.MINOR.PATCH" in done.stderr or "usage: " in done.stderr


def test_the_workflow_publishes_what_was_checked() -> None:
    workflow: dict[Any, Any] = load(GITHUB / "workflows" / "release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}} and workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"]
    assert jobs["publish"]["needs"] == "build" and jobs["announce"]["needs"] == "publish"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    commands = [step.get("run", "") for step in jobs["build"]["steps"]]
    (check,) = [n for n, command in enumerate(commands) if '.ci/release.py "$GITHUB_REF_NAME"' in command]
    assert SCRIPT.stat().st_mode & 0o100
    assert check < commands.index("python -m build")
    text = (GITHUB / "workflows" / "release.yml").read_text("utf-8")
    assert "secrets." not in text
    for action in re.findall(r"uses: (.+)", text):
        assert re.fullmatch(r"(actions|pypa)/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


@pytest.mark.slow
def test_the_source_archive_builds_the_same_wheel(tmp_path: Path) -> None:
    source = tmp_path / "checkout"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        copy(PROJECT / name, source / name)
    program = "from setuptools.build_meta import build_sdist; import sys; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    built = []
    for name, root in (("checkout", PROJECT), ("archive", unpacked)):
        (tmp_path / name / "built").mkdir(parents=True)
        built.append(names_of(build_wheel(tmp_path / name / "built", root)))
    assert built[0] == built[1] and len(built[0]) > 300


def names_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())
