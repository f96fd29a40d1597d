"""References from code, comments and pages to documents resolve; the table of rooms matches the packages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.paths import PROJECT

DESIGN = PROJECT / "docs" / "design.md"
FOLDERS = (".github", "data_prep", "docs", "ds_configs", "examples", "pipeline", "slurm", "tests")
TEXTS = {".ini", ".ipynb", ".json", ".md", ".py", ".sh", ".toml", ".yaml", ".yml"}
DOCUMENT = re.compile(r"(?<![\w./:-])((?:[\w.-]+/)*[\w-]+\.md)\b")
NUMBER = r"(?:\d+(?:\.\d+)?|[FM]\d+)"
CITATION = re.compile(rf"docs/design\.md ({NUMBER}(?:(?:, | and | to ){NUMBER}(?![\w.]\d))*)")
# How the design refers to its own sections: "(7.3)", "Hence 3.8 and ...".
INNER = re.compile(r"(?:\(|Hence )([1-9]\.\d{1,2})\b(?!\d)")
# Only the design has numbered sections.
OTHER_NUMBERED = re.compile(r"([\w./-]+\.md)(?: section)? \d")
HOME = "index.md"  # how the site calls README.md
# Package data is named from its package.
FROM_PACKAGE = {("pyproject.toml", "nano/README.md"): "data_prep"}


def texts() -> list[Path]:
    """Every text file of the repository that may cite a document."""
    files = [path for path in PROJECT.iterdir() if path.suffix in TEXTS or path.name == "Makefile"]
    for folder in FOLDERS:
        files += [path for path in (PROJECT / folder).rglob("*") if path.suffix in TEXTS]
    return sorted(path for path in files if path.is_file() and path != Path(__file__))


def unwrapped(text: str) -> str:
    """The text with the lines of a comment or a docstring joined, so that a reference may cross the end of a line."""
    return re.sub(r"\s*\n[ \t]*(?:#[ \t]*)?", " ", text)


def sections(page: str) -> dict[str, set[str]]:
    """Numbers of the headings, each with the numbered rows of its tables."""
    found: dict[str, set[str]] = {}
    number = ""
    for line in page.splitlines():
        if heading := re.match(r"#{2,3} (\d+(?:\.\d+)?) ", line):
            number = heading[1]
            found[number] = set()
        elif row := re.match(r"\| ([FM]\d+) \|", line):
            found[number].add(row[1])
    return found


def missing(cited: str, known: dict[str, set[str]]) -> Iterator[str]:
    """The parts of a citation such as "3.5 to 3.7 and 4.10, F1" that are no heading, or no row of the one before."""
    section, last, joined = "", "", ""
    for part in re.split(r"(, | and | to )", cited):
        if part in (", ", " and ", " to "):
            joined = part
            continue
        if not (part in known or part in known.get(section, ())):
            yield part
        elif joined == " to ":
            order = list(known)
            if part not in known or last not in known or order.index(part) <= order.index(last):
                yield f"{last} to {part}"
        section, last = (part if part in known else section), part


def test_every_document_that_is_named_exists() -> None:
    wrong = []
    for path in texts():
        place = path.relative_to(PROJECT).as_posix()
        text = path.read_text("utf-8")
        for name in DOCUMENT.findall(text):
            package = FROM_PACKAGE.get((place, name), "")
            folders = (PROJECT / package, PROJECT / "docs", path.parent)
            if name != HOME and not any((folder / name).is_file() for folder in folders):
                wrong.append(f"{place}: {name}")
        wrong += [f"{place}: {name} N" for name in OTHER_NUMBERED.findall(unwrapped(text)) if name != "docs/design.md"]
    assert not wrong


def test_every_cited_section_of_the_design_exists() -> None:
    known = sections(DESIGN.read_text("utf-8"))
    cited = [
        (path.relative_to(PROJECT).as_posix(), numbers)
        for path in texts()
        for numbers in CITATION.findall(unwrapped(path.read_text("utf-8")))
    ]
    assert len(cited) > 50, "the pattern finds the references that there are"
    assert not [(place, part) for place, numbers in cited for part in missing(numbers, known)]
    inner = INNER.findall(unwrapped(DESIGN.read_text("utf-8")))
    assert len(inner) > 5 and not [part for numbers in inner for part in missing(numbers, known)]


@pytest.mark.parametrize(
    ("cited", "expected"),
    [
        ("1.2", []),
        ("1.1 to 1.3 and 2", []),
        ("1.2, F1", []),
        ("1.1, F1", ["F1"]),  # the row of another section
        ("1.3 to 1.1", ["1.3 to 1.1"]),
        ("1, 7.9", ["7.9"]),
    ],
)
def test_a_citation_is_resolved_part_by_part(cited: str, expected: list[str]) -> None:
    known = sections("## 1 A\n### 1.1 B\n### 1.2 C\n| F1 | a fault |\n### 1.3 D\n## 2 E\n")
    assert list(missing(cited, known)) == expected


def test_a_reference_may_cross_the_end_of_a_line() -> None:
    comment = "x = 1  # as in docs/design.md\n    # 4.10, F1: a fault\n"
    assert CITATION.findall(unwrapped(comment)) == ["4.10, F1"]
    assert DOCUMENT.findall("see docs/gone.md, https://example.org/DATASETS.md and a `gone.md`.") == [
        "docs/gone.md",
        "gone.md",
    ]


def rooms() -> list[str]:
    """The rooms of the table in section 1, from the ground up."""
    section = DESIGN.read_text("utf-8").split("\n## 2 ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def contracts() -> dict[str, dict[str, Any]]:
    toml = pytest.importorskip("tomllib")  # of Python 3.11
    project = toml.loads((PROJECT / "pyproject.toml").read_text("utf-8"))
    return {contract["name"]: contract for contract in project["tool"]["importlinter"]["contracts"]}


def test_the_table_of_rooms_names_the_packages() -> None:
    packages = {path.parent.name for path in (PROJECT / "pipeline").glob("*/__init__.py")}
    assert set(rooms()) == packages | {"errors", "data_prep"}
    assert len(rooms()) == len(set(rooms()))


def test_the_table_of_rooms_has_the_order_of_the_import_contract() -> None:
    layers = contracts()["A room imports only rooms below it"]["layers"]
    single = [layer for layer in layers if "|" not in layer]
    assert [room for room in rooms() if room != "data_prep"] == single[::-1]


def test_data_prep_stands_where_the_contracts_put_it() -> None:
    below = rooms()[: rooms().index("data_prep")]
    may_not_use_it = {
        name.split(".")[1] for name in contracts()["Only verbs and checks prepare data"]["source_modules"]
    }
    above = {name.split(".")[1] for name in contracts()["Preparing data needs no run"]["forbidden_modules"]}
    assert set(below) <= may_not_use_it
    assert not above & set(below)
