"""Modules that the command line imports when a verb uses them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline.cli
from pipeline.cli.lazy import lazy
from pipeline.config.paths import PROJECT

FILES = sorted(Path(pipeline.cli.__file__).parent.glob("*.py"))


def test_a_lazy_module_is_imported_by_the_first_look_at_a_name() -> None:
    stands_for = lazy("wave")
    assert stands_for.Error is importlib.import_module("wave").Error
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = stands_for.no_such_name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_mypy_sees_is_what_is_imported(file: Path) -> None:
    """The names under TYPE_CHECKING stand for the modules that `lazy` is given, in their order."""
    for node in ast.parse(file.read_text("utf-8")).body:
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            continue
        seen = {
            alias.asname or alias.name: f"{line.module}.{alias.name}"
            for line in node.body
            if isinstance(line, ast.ImportFrom)
            for alias in line.names
        }
        given: dict[str, str] = {}
        for line in node.orelse:
            assert isinstance(line, ast.Assign)
            names = [name.id for name in ast.walk(line.targets[0]) if isinstance(name, ast.Name)]
            texts = [str(text.value) for text in ast.walk(line.value) if isinstance(text, ast.Constant)]
            given |= dict(zip(names, texts, strict=True))
        assert given == seen
        assert all(importlib.util.find_spec(module) for module in given.values())


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["serve", "--help"], ["add", "--help"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    program = (
        "import sys; from pipeline.cli.commands import app; app(sys.argv[1:], standalone_mode=False); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'deepspeed', 'matplotlib', 'mlflow')))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=PROJECT, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
