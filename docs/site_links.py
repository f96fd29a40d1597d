"""Hooks of mkdocs: README.md is the first page, and links to files outside of docs/ lead to copies inside the site.

The same Markdown is read on GitHub, where such links are relative to the repository. Pages of the site lie elsewhere,
so the links of each page are rewritten when it is built, and the files that they lead to are added under `source/`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
FIRST, HOME = "README.md", "index.md"
DOCS, SOURCE = "docs/", "source/"
LINK = re.compile(r"(\]\()([^)#\s:]+)(?=[#)])")


def place_in_site(file: str) -> str:
    """The path in the site of a file of the repository."""
    if file == FIRST:
        return HOME
    return file.removeprefix(DOCS) if file.startswith(DOCS) else SOURCE + file


def place_in_repository(page: str) -> str:
    """The path in the repository of a page of the site."""
    if page == HOME:
        return FIRST
    return page.removeprefix(SOURCE) if page.startswith(SOURCE) else DOCS + page


def targets(file: str, text: str) -> list[str]:
    """The files of the repository that a Markdown file of it links to."""
    return [posixpath.normpath(posixpath.join(posixpath.dirname(file), link[1])) for link in LINK.findall(text)]


def rewritten(file: str, text: str) -> str:
    """The text of a Markdown file of the repository with its links as they are in the site."""
    page = posixpath.dirname(place_in_site(file))

    def link(found: re.Match[str]) -> str:
        (target,) = targets(file, found[0] + ")")
        return found[1] + posixpath.relpath(place_in_site(target), page or ".")

    return LINK.sub(link, text)


def outside(pages: list[str]) -> list[str]:
    """The files outside of docs/ that these Markdown files of the repository link to, and those that they link to."""
    found: list[str] = []
    waiting = list(pages)
    while waiting:
        file = waiting.pop()
        for target in targets(file, (PROJECT / file).read_text("utf-8")):
            if not target.startswith(DOCS) and target not in (FIRST, *found) and (PROJECT / target).is_file():
                found.append(target)
                waiting += [target] * target.endswith(".md")
    return found


def on_files(files: Any, config: Any) -> Any:
    """Add README.md and the files outside of docs/ that pages link to."""
    from mkdocs.structure.files import File, InclusionLevel  # here, because the tests import this file without mkdocs

    pages = [FIRST, *(DOCS + file.src_uri for file in files.documentation_pages())]
    for file in [FIRST, *outside(pages)]:
        added = File.generated(config, place_in_site(file), abs_src_path=str(PROJECT / file))
        if file != FIRST:
            added.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, **more: Any) -> str:
    """Rewrite the links of a page."""
    return rewritten(place_in_repository(page.file.src_uri), markdown)
