"""The project as a user gets it: built into a wheel, and installed with what its metadata asks for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.processes import PROJECT

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "pipeline", "data_prep", "ds_configs", "slurm")
NAME = "continual-prompts"


def build_wheel(folder: Path, root: Path = PROJECT) -> Path:
    """Build the wheel from a copy of the sources: `build/` in the project would keep modules that are gone."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        path = root / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__", "site.env"))
        else:
            shutil.copy(path, source / name)
    _pip(sys.executable, "wheel", "--no-build-isolation", "--wheel-dir", str(folder / "dist"), str(source))
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel in it, and a working folder that has nothing to do with the project."""

    folder: Path
    work: Path

    @property
    def packages(self) -> Path:
        """Where the wheel is installed."""
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def run(self, program: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, such as python, in the working folder."""
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env["PATH"] = os.pathsep.join([str(self.folder / "bin"), env["PATH"]])
        command = [str(self.folder / "bin" / program), *arguments]
        return subprocess.run(command, cwd=self.work, env=env, capture_output=True, text=True, timeout=timeout)


def install(wheel: Path, folder: Path, extras: Iterable[str] = ()) -> Environment:
    """Install a wheel with some of its extras into a new environment, without a network.

    What the metadata asks for, and what that asks for, is linked from the environment of the tests; nothing else is
    there to be imported.
    """
    venv.create(folder / "venv", with_pip=False)
    (folder / "work").mkdir()
    environment = Environment(folder / "venv", folder / "work")
    _pip(str(environment.folder / "bin" / "python"), "install", str(wheel))
    (installed,) = environment.packages.glob("*.dist-info")
    asked = metadata.PathDistribution(installed).requires or []
    for found in distributions(asked, extras):
        _link(found, environment.packages)
    return environment


def distributions(asked: Iterable[str], extras: Iterable[str] = ()) -> list[metadata.Distribution]:
    """Distributions of this environment that requirements name, and in turn theirs, under extras of the project."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(text), extra) for text in asked for extra in ("", *extras)]
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if name == NAME or (requirement.marker is not None and not requirement.marker.evaluate({"extra": extra})):
            continue
        own = ("", *requirement.extras)
        if all((name, extra) in seen for extra in own):
            continue
        seen |= {(name, extra) for extra in own}
        distribution = metadata.distribution(name)
        found[name] = distribution
        todo += [(Requirement(text), extra) for text in distribution.requires or [] for extra in own]
    return list(found.values())


def _link(distribution: metadata.Distribution, packages: Path) -> None:
    tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}
    for top in tops:
        source, target = Path(str(distribution.locate_file(top))), packages / top
        if source.exists() and not target.exists():
            target.symlink_to(source)


def _pip(python: str, verb: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", verb]
    command += ["--no-deps", "--no-index", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
