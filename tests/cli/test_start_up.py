"""What a verb imports: nothing that takes seconds and that it does not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.paths import PROJECT
from tests.report.test_report import make_run

ALWAYS = ("torch", "transformers", "deepspeed", "mlflow", "matplotlib", "webdataset", "pyarrow", "pandas", "sklearn")
# What a verb's modules may import when they are loaded, of the libraries above; the rest belongs to other verbs.
NEEDED = {
    "pipeline.cli.commands": (),
    "pipeline.report.listing": (),
    "pipeline.report.summary": (),
    "pipeline.report.page": ("matplotlib",),
    "pipeline.clip.benchmark.report": ("matplotlib",),
    "pipeline.data.shards": ("pyarrow",),
    "pipeline.adapter.from_run": ("torch",),
    "pipeline.adapter.edit": ("torch",),
    "pipeline.adapter.load": ("torch", "transformers"),
    "pipeline.adapter.predict": ("torch", "transformers"),
    "pipeline.sequence.add_task": (),
    "data_prep.own_task": (),
    "pipeline.ui.server": ("matplotlib", "pyarrow"),
}


@pytest.mark.parametrize("module", NEEDED)
def test_a_verb_imports_what_it_needs(module: str) -> None:
    program = f"import sys, {module}; print(*(name for name in {ALWAYS} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= set(NEEDED[module])


def test_a_report_is_written_without_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    program = (
        "import sys; from pipeline.cli.commands import app; app(sys.argv[1:], standalone_mode=False); "
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "report", str(run)], cwd=PROJECT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").is_file()
    modules = set(done.stdout.split())
    assert "pipeline.report.predictions" in modules
    assert not modules & {"torch", "transformers", "deepspeed", "mlflow"}


def test_a_recipe_is_read_without_torch_whatever_its_method() -> None:
    program = (
        "import sys; from pipeline.config import registry; from pipeline.config.load import load_recipe\n"
        "from pipeline.methods import make_method\n"
        "for name in registry.names('methods'): make_method(load_recipe('nano', [f'method.name={name}']).method)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
