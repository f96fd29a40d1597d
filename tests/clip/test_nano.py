"""The benchmark that ships with everything it needs, in short, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import EXIT_OK
from tests.clip.test_run import program


@pytest.mark.slow
def test_base2new_nano_prints_base_new_and_harmonic_mean_with_deviation(tmp_path: Path) -> None:
    changes = ["methods=[zero_shot,mpl]", "seeds=[1,2]", "train.epochs=2", "tracking.enabled=false"]
    done = program(tmp_path, "run", "base2new_nano", *(part for text in changes for part in ("--set", text)))
    assert done.returncode == EXIT_OK, done.stderr[-3000:]
    assert all(word in done.stdout for word in ("base", "new", "HM of seeds", "zero_shot", "mpl", "±"))
    run = tmp_path / "runs" / "base2new_nano"
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    lines = {line["method"]: line for line in json.loads((run / "results.json").read_text())["lines"]}
    assert lines["mpl"]["groups"]["base"]["seeds"] == 2
    assert lines["mpl"]["harmonic"] > lines["zero_shot"]["harmonic"] + 5  # it learns, and what it learned carries over
