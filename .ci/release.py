#!/usr/bin/env python3
"""What has to agree before a tag is published: `.ci/release.py vVERSION`; prints the text of the release.

The tag, `__version__`, CITATION.cff and the newest heading of CHANGELOG.md name one version, and nothing is unreleased.
"""

import re
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def problems(tag: str, project: Path) -> list[str]:
    """A sentence for each thing that names another version than the tag; empty where the tag can be published."""

    def found(file: str, pattern: str) -> str:
        match = re.search(pattern, (project / file).read_text("utf-8"), re.MULTILINE)
        return match[1] if match else "nothing"

    version = tag.removeprefix("v")
    if not re.fullmatch(r"v\d+\.\d+\.\d+", tag):
        return [f"the tag is '{tag}'; expected vMAJOR.MINOR.PATCH."]
    named = {
        "__version__ in pipeline/__init__.py": found("pipeline/__init__.py", r'^__version__ = "(.+)"$'),
        "version in CITATION.cff": found("CITATION.cff", r"^version: (.+)$"),
        "the first heading of CHANGELOG.md": found("CHANGELOG.md", r"^## (\S+)"),
    }
    return [
        f"{where} is {name}; expected {version}, as the tag says." for where, name in named.items() if name != version
    ]


def notes(project: Path) -> str:
    """The newest section of the changelog."""
    return re.split(r"^## .+$", (project / "CHANGELOG.md").read_text("utf-8"), maxsplit=2, flags=re.MULTILINE)[
        1
    ].strip()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: .ci/release.py vVERSION")
    wrong = problems(sys.argv[1], PROJECT)
    if wrong:
        print(*(f"error: {sentence}" for sentence in wrong), sep="\n", file=sys.stderr)
        sys.exit(2)
    print(notes(PROJECT))
