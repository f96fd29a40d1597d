"""What a verb imports: nothing that takes seconds and that it does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline.config import PROJECT

ALWAYS = ("torch", "transformers", "deepspeed", "mlflow", "matplotlib", "webdataset", "pyarrow", "pandas", "sklearn")
# What a verb's modules may import when they are loaded, of the libraries above; the rest belongs to other verbs.
NEEDED = {
    "pipeline.cli": (),
    "pipeline.listing": (),
    "pipeline.run_summary": (),
    "pipeline.report": ("matplotlib",),
    "pipeline.clip.report": (),
    "pipeline.adapter": ("torch", "pyarrow"),
    "pipeline.add_task": (),
    "data_prep.own_task": ("torch",),
}


@pytest.mark.parametrize("module", NEEDED)
def test_a_verb_imports_what_it_needs(module: str) -> None:
    program = f"import sys, {module}; print(*(name for name in {ALWAYS} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= set(NEEDED[module])
