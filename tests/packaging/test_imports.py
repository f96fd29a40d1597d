"""Imports inside the project, and where its modules lie; the rooms' order is in pyproject.toml (import-linter)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import PROJECT

MOST_DEFERRED = 25
MOST_LINES = 300
REASON = "one file because"  # how the docstring of a longer file says why it is not two
SOURCES = sorted(path for top in ("pipeline", "data_prep") for path in (PROJECT / top).rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """An import of a module of the project."""

    importer: str
    imported: str
    place: str  # file:line
    deferred: bool  # stands inside a function
    reason: bool  # a comment on its first line or on the line above


def module_name(path: Path) -> str:
    parts = list(path.relative_to(PROJECT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports_of(path: Path) -> Iterator[Import]:
    """All imports of project modules in a file: at the top, under TYPE_CHECKING and inside functions."""
    text = path.read_text("utf-8")
    lines = text.splitlines()

    def walk(node: ast.AST, deferred: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = deferred or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import | ast.ImportFrom):
                reason = "#" in lines[child.lineno - 1] or lines[child.lineno - 2].lstrip().startswith("#")
                place = f"{path.relative_to(PROJECT)}:{child.lineno}"
                for name in sorted(imported(child)):
                    yield Import(module_name(path), name, place, inside, reason)
            yield from walk(child, inside)

    return walk(ast.parse(text), False)


def imported(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The modules of the project that a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names if alias.name in MODULES}
    assert not node.level, "imports are written with the whole name"
    whole = {f"{node.module}.{alias.name}" for alias in node.names}
    return (whole & MODULES.keys()) or ({str(node.module)} & MODULES.keys())


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return [found for path in SOURCES for found in imports_of(path)]


def test_an_import_inside_a_function_says_what_it_defers_and_there_are_few(imports: list[Import]) -> None:
    deferred = [found for found in imports if found.deferred]
    assert not [found.place for found in deferred if not found.reason]
    assert len({found.place for found in deferred}) <= MOST_DEFERRED


def test_no_module_imports_itself_by_way_of_others(imports: list[Import]) -> None:
    """Imports inside functions and for types count: a cycle is one whenever it is closed."""
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in imports:
        if found.imported != "pipeline":  # its __init__ only names what is public, and imports that when it is used
            graph[found.importer].add(found.imported)
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"in cycles, or importing from them: {sorted(graph)}"


def test_few_modules_lie_outside_of_the_rooms() -> None:
    assert len(list((PROJECT / "pipeline").glob("*.py"))) <= 6


def test_a_long_file_says_why_it_is_one() -> None:
    long = [path for path in SOURCES if len(path.read_text("utf-8").splitlines()) > MOST_LINES]
    silent = [path for path in long if REASON not in " ".join((docstring(path)).split()).lower()]
    assert not [str(path.relative_to(PROJECT)) for path in silent]


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
