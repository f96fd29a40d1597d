"""A benchmark that was stopped inside a training goes on at that step and learns what an undisturbed one learns."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_prep.benchmark import prepare_benchmark
from pipeline.cli.commands import app
from pipeline.clip.benchmark.run import run_benchmark
from pipeline.clip.learning.model import PromptedCLIP
from pipeline.clip.recipe import ClipRecipe
from pipeline.console.progress import SPEEDS
from pipeline.errors import EXIT_OK, EXIT_RESUMABLE, Interrupted
from pipeline.files.atomic import sha256
from tests.clip.project import fields, make_project, recipe, recipe_file
from tests.processes import torchrun
from tests.stopping import signal_in_forward

STEPS = 6  # of 2 epochs with 12 images in batches of 4
LIMIT_S = 300
COOP: dict[str, Any] = {"name": "coop", "options": {"length": 2}, "train": {"augment": "none"}}
MPL: dict[str, Any] = {"name": "mpl", "options": {"depth": 3}}
AVERAGED: dict[str, Any] = {
    "name": "promptsrc",
    "method": "ivlp",
    "options": {"length": 2, "length_vision": 2, "depth": 2},
    "consistency": {"templates": ["a {}."]},
    "average": {"mean": 1, "deviation": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and prepared data."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    prepare_benchmark(recipe(folder, COOP), progress=False)
    return folder


def unit(run: Path, method: str) -> Path:
    return run / "units" / f"{method}-toys-s1"


def outcome(run: Path, method: str) -> list[Any]:
    """All that a unit computed: prompts, the log without what depends on the machine's speed, and counts."""
    lines = [json.loads(line) for line in (unit(run, method) / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if name not in SPEEDS} for line in lines]
    counts = json.loads((unit(run, method) / "result.json").read_text())
    return [sha256(unit(run, method) / "prompts.safetensors"), kept, counts]


def make(folder: Path, tmp_path: Path, name: str, *methods: Any, **train: Any) -> ClipRecipe:
    changes = {"seeds": [1], "run_dir": str(tmp_path / name)}
    return recipe(folder, *methods, train={"save_minutes": None, **train}, **changes)


@pytest.mark.parametrize(
    ("method", "train"),
    [
        pytest.param(COOP, {"deepspeed": "ds_configs/zero0.json"}, id="coop-zero0"),
        pytest.param(AVERAGED, {"deepspeed": "ds_configs/zero3.json", "micro_batch": 2}, id="averaged-zero3-cut"),
        pytest.param(MPL, {"deepspeed": "ds_configs/zero2.json"}, id="mpl-zero2"),
        pytest.param(MPL, {"deepspeed": "ds_configs/zero2.json", "momentum": 0.0}, id="mpl-without-momentum"),
    ],
)
@pytest.mark.parametrize("step", [2, 4])  # in the first and in the second epoch
def test_a_stopped_unit_goes_on_bit_for_bit(
    folder: Path, tmp_path: Path, method: dict[str, Any], train: dict[str, Any], step: int
) -> None:
    whole, stopped = (make(folder, tmp_path, name, method, **train) for name in ("whole", "stopped"))
    run_benchmark(whole)
    calls = 2 if "micro_batch" in train else 1
    with signal_in_forward(PromptedCLIP, calls * step), pytest.raises(Interrupted) as told:
        run_benchmark(stopped)
    assert f"after step {step} of {STEPS}. What was finished is kept" in str(told.value)
    assert f"resume from step-0000000{step}" in str(told.value)
    run_benchmark(stopped)
    assert outcome(stopped.run_path, method["name"]) == outcome(whole.run_path, method["name"])
    assert not (unit(stopped.run_path, method["name"]) / "resume").exists()


def test_the_command_line_leaves_with_75_and_the_same_command_goes_on(folder: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    changes: dict[str, Any] = {"seeds": [1], "run_dir": str(tmp_path / "run"), "tracking": {"uri": store}}
    command = ["run", str(recipe_file(folder, COOP, name="stopped", **changes))]
    with signal_in_forward(PromptedCLIP, 3, signal.SIGTERM, signals=3):
        done = CliRunner().invoke(app, command)
    assert done.exit_code == EXIT_RESUMABLE, done.output
    assert "stopped: Stopped by a signal after step 3 of 6." in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"
    assert CliRunner().invoke(app, command).exit_code == EXIT_OK
    steps = [json.loads(line)["step"] for line in (unit(tmp_path / "run", "coop") / "metrics.jsonl").open()]
    assert steps == list(range(1, STEPS + 1))
    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("stopped").experiment_id])
    (child,) = (run for run in runs if "mlflow.parentRunId" in run.data.tags)  # the stopped unit's run went on
    assert len(runs) == 2
    assert {point.step for point in client.get_metric_history(child.info.run_id, "loss")} >= set(steps)


def test_a_signal_in_the_last_step_keeps_the_finished_unit(folder: Path, tmp_path: Path) -> None:
    stopped = make(folder, tmp_path, "stopped", COOP, MPL)
    with signal_in_forward(PromptedCLIP, STEPS), pytest.raises(Interrupted, match="in the evaluation of coop-toys-s1"):
        run_benchmark(stopped)
    assert (unit(stopped.run_path, "coop") / "COMPLETE").is_file()


def test_a_damaged_checkpoint_inside_a_unit_is_passed_over(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, stopped = (make(folder, tmp_path, name, MPL, save_steps=1) for name in ("whole", "stopped"))
    run_benchmark(whole)
    with signal_in_forward(PromptedCLIP, 3), pytest.raises(Interrupted):
        run_benchmark(stopped)
    work = tmp_path / "stopped" / "units" / "mpl-toys-s1.unfinished" / "resume"
    assert sorted(path.name for path in work.iterdir()) == ["step-00000002", "step-00000003"]
    (work / "step-00000003" / "state.safetensors").write_bytes(b"cut")
    with caplog.at_level("INFO", logger="pipeline"):
        run_benchmark(stopped)
    assert "step-00000003 is skipped" in caplog.text
    assert "resuming after step 2" in caplog.text
    assert outcome(stopped.run_path, "mpl") == outcome(whole.run_path, "mpl")


def test_the_watchdog_follows_a_benchmark(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.ranks.watchdog import Watchdog

    beat, progress, seen, counted = Watchdog.beat, Watchdog.progress, [], []

    def heard(self: Watchdog, doing: str, slow: bool = False) -> None:
        seen.append((self.limit_s, doing))
        beat(self, doing, slow)

    def made(self: Watchdog) -> None:
        counted.append(seen[-1][1] if seen else "before")
        progress(self)

    monkeypatch.setattr(Watchdog, "beat", heard)
    monkeypatch.setattr(Watchdog, "progress", made)
    run_benchmark(make(folder, tmp_path, "watched", MPL, watchdog_s=50))
    doing = [what for _, what in seen if what != "fetching"]
    assert {limit for limit, _ in seen} == {50}
    assert doing[:2] == ["before unit mpl-toys-s1", "step 1 of 6"]
    assert doing[6:8] == ["step 6 of 6", "saving mpl-toys-s1"]
    assert counted.count("in the evaluation of mpl-toys-s1") > 2 + 2  # the beats themselves, and towers at work


@pytest.mark.gloo
@pytest.mark.slow
def test_two_ranks_stop_together_and_go_on_on_two_and_on_one(folder: Path, tmp_path: Path) -> None:
    """One rank is told; bit for bit on two, and on one what one learns without a stop, to 1e-6."""

    def job(ranks: int, stop: int | None, *names: str) -> None:
        file = tmp_path / "job.json"
        recipes = [
            fields(
                folder,
                MPL,
                AVERAGED,
                name=name,
                seeds=[1],
                run_dir=str(tmp_path / name),
                train={"deepspeed": "ds_configs/zero3.json"},
            )
            for name in names
        ]
        file.write_text(json.dumps({"recipes": recipes, "stop": stop}))
        torchrun(["-m", "tests.clip.worlds", str(file)], ranks, LIMIT_S)

    job(2, STEPS + 4, "to-2", "to-1")  # in the second unit
    for name in ("to-2", "to-1"):
        assert (tmp_path / name / "units" / "promptsrc-toys-s1.unfinished/resume/step-00000004").is_dir()
    job(2, None, "to-2", "whole")
    job(1, None, "to-1")
    for method in ("mpl", "promptsrc"):
        assert outcome(tmp_path / "to-2", method) == outcome(tmp_path / "whole", method)
        wanted, found = (outcome(tmp_path / name, method)[1] for name in ("whole", "to-1"))
        assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], abs=1e-6)
