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


def test_without_the_packages_the_first_cell_is_a_sentence(tmp_path: Path) -> None:
    """-S: without what is installed beside Python."""
    done = subprocess.run([sys.executable, "-S", "-c", code()[0]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "pipeline, torch, transformers, deepspeed, sklearn cannot be imported here. Choose the kernel" in done.stderr


def test_the_notebook_is_stored_with_its_results_and_no_noise() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    texts = "".join("".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs)
    assert "after the last stage: {'Colours': " in texts and "selected=" in texts
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2  # a sample, and the matrix
    assert all(noise not in texts for noise in ("Warning", "WARNING", "Traceback", "%|", str(PROJECT), "/tmp/"))
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.e2e
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    # In a folder of its own, so that the project's stays as it is; the package is found as an installed one is.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # with which a kernel does not catch what libraries print
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
