"""The container files: what they copy and install is there, and is what the project says of itself.

`.github/workflows/ci.yml` builds the image and runs it; here no builder is needed.
"""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.packaging.installed import SOURCES
from tests.packaging.test_make_venv import stand_in
from tests.processes import PROJECT

DOCKERFILE = (PROJECT / "Dockerfile").read_text("utf-8")
APPTAINER = (PROJECT / "apptainer.def").read_text("utf-8")
IMAGE = r"python:(\d+\.\d+)\.\d+-slim-bookworm"
INSTALLER = PROJECT / "containers" / "install.sh"


def instructions(name: str) -> list[list[str]]:
    """The arguments of a Dockerfile's instructions of that name."""
    return [line.split()[1:] for line in DOCKERFILE.splitlines() if line.split()[:1] == [name]]


def section(name: str) -> list[str]:
    """The lines of a section of the Apptainer definition."""
    found = re.search(rf"^%{name}\n((?:[ ]{{4}}.+\n)+)", APPTAINER, re.MULTILINE)
    assert found is not None, name
    return [line.strip() for line in found[1].splitlines()]


def copied() -> set[str]:
    """What the Dockerfile copies of the project."""
    return {source for words in instructions("COPY") if not words[0].startswith("--") for source in words[:-1]}


def test_everything_that_is_copied_is_there_and_is_what_a_wheel_needs() -> None:
    needed = {*SOURCES, "requirements.txt", "containers/install.sh"}
    assert copied() == needed
    assert {line.split()[0] for line in section("files")} == needed
    assert all((PROJECT / path).exists() for path in needed)


def test_the_builder_is_sent_what_is_copied_and_nothing_else() -> None:
    lines = [line for line in (PROJECT / ".dockerignore").read_text("utf-8").splitlines() if line[:1] not in ("", "#")]
    assert lines[0] == "*"
    sent = {line[1:] for line in lines if line.startswith("!")}
    assert sent == {path.partition("/")[0] for path in copied()}
    left_out = [line for line in lines[1:] if not line.startswith("!")]
    assert "slurm/site.env" in left_out and any(fnmatch.fnmatch("pipeline/__pycache__", line) for line in left_out)


def test_both_begin_with_the_same_pinned_python() -> None:
    images = [words[0] for words in instructions("FROM")] + re.findall(r"^From: (.+)$", APPTAINER, re.MULTILINE)
    assert len(images) == 3 and len(set(images)) == 1
    version = re.fullmatch(IMAGE, images[0])
    assert version is not None
    classifiers = (PROJECT / "pyproject.toml").read_text("utf-8")
    assert f'"Programming Language :: Python :: {version[1]}"' in classifiers


def test_the_image_is_the_command_line_of_a_user_without_rights() -> None:
    names = [line.split()[0] for line in DOCKERFILE.splitlines() if re.match(r"[A-Z]+ ", line)]
    assert "HEALTHCHECK" not in names and names.index("USER") > max(n for n, name in enumerate(names) if name == "RUN")
    assert instructions("USER") == [["user"]]
    (entry,) = instructions("ENTRYPOINT")
    (program,) = json.loads(" ".join(entry))
    scripts = (PROJECT / "pyproject.toml").read_text("utf-8").partition("[project.scripts]\n")[2].splitlines()[0]
    assert scripts.startswith(f"{program} = ")
    assert section("runscript") == [f'exec {program} "$@"']


@pytest.mark.parametrize(
    ("torch", "index"),
    [
        ("cpu", "--extra-index-url https://download.pytorch.org/whl/cpu "),
        ("cu126", "--extra-index-url https://download.pytorch.org/whl/cu126 "),
        ("cuda", ""),
    ],
)
def test_the_installer_takes_the_build_that_is_asked_for(torch: str, index: str, tmp_path: Path) -> None:
    code, _, calls = installed(torch, tmp_path)
    assert code == 0
    assert calls[-1] == f"python -m pip install --no-cache-dir {index}-r requirements.txt"
    assert any(call.startswith("apt-get install") and "g++" in call.split() for call in calls)


def test_the_installer_refuses_a_build_that_is_none(tmp_path: Path) -> None:
    code, said, calls = installed("gpu", tmp_path)
    assert (code, calls) == (2, []) and "TORCH is 'gpu'; expected cpu, cuda" in said


def test_both_hand_the_build_to_the_installer() -> None:
    assert ["TORCH=cpu"] in instructions("ARG")
    assert 'RUN sh /tmp/install/install.sh "$TORCH" /tmp/install/requirements.txt' in DOCKERFILE
    assert section("arguments") == ["TORCH=cuda"]
    assert 'sh /source/containers/install.sh "{{ TORCH }}" /source/requirements.txt' in section("post")


def installed(torch: str, folder: Path) -> tuple[int, str, list[str]]:
    """Exit code and messages of the installer, and what it calls; apt-get, python and rm are stand-ins."""
    calls = folder / "calls"
    for name in ("apt-get", "python", "rm"):
        stand_in(folder / name, f'echo "{name} $*" >> {calls}')
    done = subprocess.run(
        ["/bin/sh", str(INSTALLER), torch, "requirements.txt"],
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr, calls.read_text().splitlines() if calls.exists() else []


def test_the_development_container_makes_the_environment_of_the_tests() -> None:
    content = json.loads((PROJECT / ".devcontainer" / "devcontainer.json").read_text("utf-8"))
    command = content["postCreateCommand"]
    assert command.startswith("make venv TORCH=cpu && ") and "-e ." in command
    (version,) = re.findall(r"python:(\d+\.\d+)-", content["image"])
    (own,) = {words[0] for words in instructions("FROM")}
    assert own.startswith(f"python:{version}.")
    python = content["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert python == "${containerWorkspaceFolder}/.venv/bin/python"


def test_the_page_shows_what_is_built_elsewhere_too() -> None:
    page = (PROJECT / "docs" / "install.md").read_text("utf-8")
    workflow = (PROJECT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    build = "docker build --tag continual-prompts ."
    assert f"\n{build}\n" in page and f"run: {build}\n" in workflow
    make = "apptainer build continual-prompts.sif apptainer.def"
    assert f"\n{make}\n" in page and f"{make} " in APPTAINER
