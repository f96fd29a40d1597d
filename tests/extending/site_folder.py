"""Installs the example packages as pip would, without pip: modules and entry points in a folder on the path."""

from __future__ import annotations

import configparser
import shutil
from pathlib import Path

PACKAGES = Path(__file__).parent / "packages"
SECTION = "project.entry-points."


def install(site: Path, *names: str) -> Path:
    """Copy the packages of these names, by default all, into `site`, each with the entry points of its pyproject."""
    for folder in sorted(PACKAGES.iterdir()):
        if (names and folder.name not in names) or not (folder / "pyproject.toml").is_file():
            continue
        site.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"{folder.name}.py", site)
        information = site / f"{folder.name}-0.1.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {folder.name}\nVersion: 0.1\n")
        # As far as tables of texts go, TOML is what configparser reads.
        project = configparser.ConfigParser()
        project.read(folder / "pyproject.toml")
        groups = [section for section in project.sections() if section.startswith(SECTION)]
        lines = []
        for section in groups:
            lines.append(f"[{section.removeprefix(SECTION).strip(chr(34))}]")
            lines += [f"{name} = {target.strip(chr(34))}" for name, target in project[section].items()]
        (information / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site
