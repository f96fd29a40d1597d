"""The benchmark that ships with everything it needs, in short, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.benchmark import prepare_benchmark
from pipeline.clip.benchmark.run import run_benchmark
from pipeline.clip.recipe import load_benchmark
from pipeline.errors import EXIT_OK
from tests.processes import program


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


@pytest.mark.slow
def test_balancing_leaves_fewer_classes_without_a_label_than_plain_entropy(tmp_path: Path) -> None:
    """The promise of active_nano's pool, after the round that first balances; other seeds than the published ones."""
    rows, seeds = ("entropy", "entropy-pcb", "badge-pcb"), (4, 5, 6)
    changes = {
        "data.root": tmp_path / "shapes",
        "data.prepared": tmp_path / "prepared",
        "run_dir": tmp_path / "run",
        "methods": f"[{', '.join(rows)}]",
        "seeds": list(seeds),
        "active.rounds": 2,
        "train.epochs": 10,
        "train.processes": 1,
        "tracking.enabled": "false",
    }
    recipe = load_benchmark("active_nano", [f"{field}={value}" for field, value in changes.items()])
    prepare_benchmark(recipe, progress=False)
    run_benchmark(recipe, evaluate=False)
    without: dict[str, list[int]] = {row: [] for row in rows}
    for row in rows:
        for seed in seeds:
            unit = recipe.run_path / "units" / f"{row}-uneven_shapes-s{seed}"
            found = [json.loads(file.read_text())["labels"] for file in sorted(unit.glob("rounds/*/selection.json"))]
            assert len(found) == 2
            without[row].append(35 - len({label for labels in found for label in labels}))
    for balanced in rows[1:]:
        assert all(few < many for few, many in zip(without[balanced], without["entropy"], strict=True)), without
