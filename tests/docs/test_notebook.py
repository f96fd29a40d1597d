"""The example notebook runs from its first cell to its last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.load import load_recipe
from pipeline.config.paths import PROJECT

NOTEBOOK = PROJECT / "examples" / "first_steps.ipynb"


def code() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("start", [PROJECT, PROJECT / "examples"], ids=["root", "examples"])
def test_the_notebook_finds_the_project_where_jupyter_starts_it(start: Path) -> None:
    """Jupyter and VS Code start it in its own folder, which Python's path then begins with."""
    program = f"{code()[0]}\nimport pipeline, data_prep, os; print(pipeline.__file__, os.environ['OMP_NUM_THREADS'])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program], cwd=start, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(PROJECT / "pipeline" / "__init__.py"), "1"], done.stderr


def test_the_notebook_writes_into_a_folder_of_its_own() -> None:
    names = dict(load_recipe=load_recipe, folder="first-steps")
    recipe = eval(code()[1].partition("recipe = ")[2].partition("\nprepare(")[0], names)
    demo = load_recipe("nano")
    assert all(
        Path(path).parts[0] == "first-steps" for path in (recipe.data.root, recipe.data.prepared, recipe.run_path)
    )
    assert recipe.data.prepared != demo.data.prepared and recipe.run_path != demo.run_path


@pytest.mark.slow
@pytest.mark.e2e
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    # In a folder of its own, so that the project's stays as it is; the package is found as an installed one is.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(PROJECT / "examples" / "first_steps.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=resources).execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if cell.cell_type == "code"
    )
    assert "after the last stage:" in printed
    assert "ld: cannot find" not in printed and "Loading weights" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["first-steps"]
