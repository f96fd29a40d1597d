"""The page of concepts introduces every word of the glossary once, and its picture is what its script draws."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from types import ModuleType

from tests.docs.test_references import DESIGN
from tests.processes import PROJECT

DOCS = PROJECT / "docs"
PAGE = " ".join((DOCS / "concepts.md").read_text("utf-8").split())


def glossary() -> list[str]:
    """The terms of section 2 of the design, those of one row apart and without their shapes."""
    section = DESIGN.read_text("utf-8").partition("## 2 Glossary")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (.+?) \|", section, re.MULTILINE)[1:]  # after the head
    return [term.strip() for cell in cells for term in re.split(r"[,:]", re.sub(r"`[^`]*`", "", cell))]


def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture_picture", DOCS / "architecture_picture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_word_of_the_glossary_is_introduced_once() -> None:
    words = Counter(word.lower() for word in re.findall(r"\*\*([^*]+)\*\*", PAGE))
    assert len(glossary()) > 30
    assert sorted(words) == sorted(set(glossary()))
    assert {word: count for word, count in words.items() if count > 1} == {}


def test_the_picture_is_what_its_script_draws() -> None:
    shown = (DOCS / "architecture.svg").read_text("utf-8")
    assert shown == drawing().picture(), "write it with: python docs/architecture_picture.py"


def test_the_picture_is_an_image_for_light_and_dark_whose_texts_are_inside_their_boxes() -> None:
    script = drawing()
    root = ElementTree.fromstring(script.picture())
    assert "prefers-color-scheme: dark" in script.STYLE
    _, _, width, height = map(int, root.attrib["viewBox"].split())
    for box in script.BOXES:
        assert box.x >= 0 and box.x + box.width <= width and box.y >= 0 and box.y + box.height <= height
        head, note = box.lines  # bold letters of 14 px are about 8.5 px wide, those of 12 px about 7
        assert len(head) * 8.5 <= box.width and len(note) * 7 <= box.width, box.lines
    assert not any(one is not other and _overlap(one, other) for one in script.BOXES for other in script.BOXES)


def _overlap(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    (x, y, width, height), (u, v, wide, high) = one[:4], other[:4]
    return x < u + wide and u < x + width and y < v + high and v < y + height
