"""What programs import: the stable names are at the top of the package, and importing it costs nothing."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

import pipeline
from tests.processes import PROJECT

NAMES = [
    "Interrupted",
    "PipelineError",
    "Question",
    "UserError",
    "export",
    "load_adapter",
    "load_recipe",
    "run_sequence",
]


def test_importing_the_package_imports_nothing_else() -> None:
    program = "import sys; before = set(sys.modules); import pipeline; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    added = {name.partition(".")[0] for name in done.stdout.split()}
    assert done.returncode == 0 and added <= {"pipeline", *sys.stdlib_module_names}, done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_stable_name_is_at_the_top_of_the_package(name: str) -> None:
    place = importlib.import_module(pipeline._PLACES[name])
    assert getattr(pipeline, name) is getattr(place, name)
    assert name in dir(pipeline) and f"`{name}" in str(pipeline.__doc__)


def test_the_stable_names_are_those_that_type_checkers_see() -> None:
    source = (PROJECT / "pipeline" / "__init__.py").read_text("utf-8")
    imported = re.findall(r"^    from ([\w.]+) import (\w+) as \2$", source, re.MULTILINE)
    assert {name: place for place, name in imported} == pipeline._PLACES
    assert sorted(pipeline._PLACES) == NAMES


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'nothing'"):
        _ = pipeline.nothing


def test_what_the_project_raises_has_one_base() -> None:
    found = {}
    for package in ("pipeline", "data_prep"):
        for file in (PROJECT / package).rglob("*.py"):
            for name, base in re.findall(
                r"^class (\w+)\((\w*(?:Exception|Error))\):", file.read_text("utf-8"), re.MULTILINE
            ):
                found[name] = base
    assert found.pop("PipelineError") == "Exception"
    assert found and all(base in {"PipelineError", *found} for base in found.values()), found
