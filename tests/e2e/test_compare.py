"""`compare` from end to end on a tiny model: runs, page, tables, the last line of --json, a kill in the middle."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from pipeline.config.paths import PROJECT
from tests.e2e.conftest import MakeRecipe

pytestmark = pytest.mark.e2e

METHODS = ["modalprompt", "task_lora"]


@pytest.fixture
def recipe(make: MakeRecipe, tmp_path: Path) -> Path:
    """A recipe's file on two tasks; its runs are in this test's folder, and tracked in a database there."""
    fields: dict[str, Any] = {"data__validation_share": 0.0, "evaluate__zero_shot": True, "train__processes": 1}
    fields["method__router"] = "mean"  # one that both methods can have
    made = make(tasks=2, run_dir=str(tmp_path / "runs" / "{method}-s{seed}"), **fields)
    content = made.model_dump(mode="json", exclude_unset=True)
    content |= {"tracking": {"enabled": True, "uri": f"sqlite:///{tmp_path / 'mlflow.db'}", "registry": False}}
    content |= {"name": "tiny", "comparison": {"methods": METHODS, "seeds": [0, 1]}}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pipeline", "compare", *map(str, arguments)]


def compare(*arguments: str | Path, code: int = 0) -> str:
    done = subprocess.run(command(*arguments), cwd=PROJECT, capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr if code else done.stdout


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def test_two_methods_with_two_seeds_after_a_kill_in_the_middle(recipe: Path, tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "runs" / "tiny-compared"
    began = subprocess.Popen(command(recipe), cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while not (runs / "modalprompt-s0" / "stages" / "01-T0" / "COMPLETE").is_file():
        assert began.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.kill(began.pid, signal.SIGKILL)
    began.wait()
    first = (runs / "modalprompt-s0" / "stages" / "01-T0" / "prompts.safetensors").stat().st_mtime_ns

    last_line = compare(recipe, "--json").rstrip().splitlines()[-1]
    assert (runs / "modalprompt-s0" / "stages" / "01-T0" / "prompts.safetensors").stat().st_mtime_ns == first
    found = json.loads(last_line)
    assert set(found) == {"tasks", "majority", "methods"}
    assert found["tasks"] == ["T0", "T1"] and len(found["majority"]) == 2 and list(found["methods"]) == METHODS
    matrices = {run.name: read(run / "matrix.json") for run in runs.glob("*-s*")}
    assert set(matrices) == {f"{method}-s{seed}" for method in METHODS for seed in (0, 1)}
    for method, row in found["methods"].items():
        assert set(row) == {"last", "told", "routed", "forgetting", "stored_per_task"}
        of_seeds = [matrices[f"{method}-s{seed}"] for seed in (0, 1)]
        assert row["last"] == pytest.approx(sum(one["metrics"]["last"] for one in of_seeds) / 2)
        assert row["routed"] == pytest.approx([sum(one["accuracy"][1][t] for one in of_seeds) / 2 for t in (0, 1)])
        assert row["told"] == pytest.approx([sum(one["told"][1][t] for one in of_seeds) / 2 for t in (0, 1)])
        assert row["stored_per_task"] == of_seeds[0]["costs"]["stored_per_task"] > 0
        for one in of_seeds:
            costs = one["costs"]
            assert costs["trained_per_stage"] > 0 and costs["operations_training"] > costs["operations_answering"] > 0
            assert all(
                free >= score
                for rows in zip(one["format_free"]["accuracy"], one["accuracy"], strict=True)
                for free, score in zip(*rows, strict=True)
                if score is not None
            )
    zero_shots = {name: matrix["zero_shot"] is not None for name, matrix in matrices.items()}
    assert sum(zero_shots.values()) == 1 and zero_shots["modalprompt-s0"], "the frozen model is scored once"

    page = (out / "report.html").read_text("utf-8")
    assert all(method in page for method in METHODS) and "<svg" in page and "Not finished" not in page
    table = list(csv.DictReader((out / "comparison.csv").open()))
    assert [row["method"] for row in table] == METHODS and float(table[0]["last"]) == found["methods"][METHODS[0]][
        "last"
    ]
    assert "| modalprompt | nothing |" in (out / "comparison.md").read_text("utf-8")
    assert read(out / "comparison.json")["methods"]["task_lora"]["seeds"] == ["0", "1"]

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    tracked = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    parents = [run for run in tracked if run.data.tags.get("kind") == "comparison"]
    assert len(parents) == 1 and parents[0].info.status == "FINISHED"
    below = {run.info.run_name for run in tracked if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id}
    assert below == set(matrices)
    assert parents[0].data.metrics["task_lora.last"] == pytest.approx(found["methods"]["task_lora"]["last"])

    # Nothing is missing now, so nothing is run; and a change of settings is said before anything would be.
    stamps = {path: path.stat().st_mtime_ns for path in runs.glob("*-s*/run.json")}
    assert compare(recipe, "--json").rstrip().splitlines()[-1] == last_line
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    said = compare(recipe, "--set", "train.steps=3", code=2)
    assert "modalprompt-s0: The run folder" in said and "train.steps: 2 there, 3 now" in said


def test_a_run_that_fails_does_not_lose_the_others(recipe: Path, tmp_path: Path) -> None:
    fields = yaml.safe_load(recipe.read_text())
    fields["tracking"] = {"enabled": False}
    # A learning rate with which float32 overflows: the loss of the second step is not a finite number.
    fields["comparison"] = {"methods": [{"name": "independent", "train": {"lr_prompt": 1e38}}, "sequential"]}
    recipe.write_text(yaml.safe_dump(fields))
    said = compare(recipe, "--json", code=1)
    error = json.loads(said[said.rindex('{"error"') :].splitlines()[0])
    assert error["exit_code"] == 1 and "1 of 2 runs failed" in error["error"] and "independent-s0:" in error["error"]
    assert read(tmp_path / "runs" / "sequential-s0" / "run.json")["status"] == "done"
    page = (tmp_path / "runs" / "tiny-compared" / "report.html").read_text("utf-8")
    assert "Not finished" in page and "independent-s0" in page and "sequential" in page
    table = (tmp_path / "runs" / "tiny-compared" / "comparison.md").read_text("utf-8")
    assert "**Not finished" in table and "* independent-s0: " in table
    assert "sequential-s0: after stage 2 (T1): T0 " in said, "what a run is at is told while it runs"
    found = json.loads(compare(recipe, "--only-page", "--json").rstrip().splitlines()[-1])
    assert list(found["methods"]) == ["sequential"] and found["missing"] == ["independent-s0"]


def test_a_budget_that_a_method_cannot_have_is_said_before_anything_is_trained(recipe: Path, tmp_path: Path) -> None:
    said = compare(recipe, "--set", "train.budget=40", code=2)
    assert "task_lora: train.budget: found 40 trained values" in said
    assert not (tmp_path / "runs").exists()
