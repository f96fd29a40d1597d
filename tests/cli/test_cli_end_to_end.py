"""Every verb on a tiny random model, called as a user does: prepare, check, run on two ranks, and what follows."""

from __future__ import annotations

import html
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from pipeline.cli.commands import app
from pipeline.config.paths import PROJECT
from pipeline.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_USER
from tests.tiny import save_llava
from tests.tiny_clip import save_clip, save_coin

Call = Callable[..., Any]
pytestmark = [pytest.mark.e2e, pytest.mark.gloo]

RECIPE = """
name: tiny
data:
  source: coin
  root: coin
  prepared: prepared
  workers: 1
  tasks: [{name: Shapes, max_new_tokens: 3}, {name: Colours, max_new_tokens: 3}]
model: {path: llava, max_length: 256}
keys: {path: clip}
method: {prompt_length: 2, gate: 0.1}
train: {steps: 2, global_batch: 4, lr_prompt: 1e-2, lr_head: 1e-3, log_every: 1, processes: 2}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    save_llava(folder / "llava")
    save_clip(folder / "clip")
    for task in ("Shapes", "Colours"):
        save_coin(folder / "coin", task)
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


def program(folder: Path, *arguments: str) -> dict[str, Any]:
    """The result of the command line in a process of its own, as training needs it."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments, "--json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == EXIT_OK, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def run(folder: Path) -> dict[str, Any]:
    """The result of `run` after `prepare`: what all tests here look at."""
    program(folder, "prepare", "tiny.yaml")
    return program(folder, "run", "tiny.yaml")


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls the command line in this process, where everything is imported already."""
    monkeypatch.chdir(folder)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_run_trains_on_two_ranks_and_reports_the_matrix(run: dict[str, Any], folder: Path) -> None:
    assert run["tasks"] == ["Shapes", "Colours"]
    assert [len(row) for row in run["accuracy"]] == [2, 2]
    state = json.loads((folder / run["run"] / "run.json").read_text())
    assert (state["status"], state["world_size"]) == ("done", 2)
    assert json.loads((folder / run["run"] / "matrix.json").read_text())["accuracy"] == run["accuracy"]


def test_check_finds_everything_in_place(run: dict[str, Any], call: Call) -> None:
    done = call("check", "tiny.yaml", "--json")
    assert done.exit_code == EXIT_OK, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    counts, *answers = found["data"].split("; ")
    assert counts == "prepared (train/test): Shapes 7/5, Colours 7/5"
    assert "5 of 5 test answers are longer than the task's max_new_tokens 3" in answers[0]
    assert "ZeRO stage 3" in found["deepspeed"]


def test_predict_answers_and_names_the_selected_sets(run: dict[str, Any], call: Call, folder: Path) -> None:
    picture = next((folder / "coin" / "images").glob("*.png"))
    done = call("predict", run["run"], "--image", str(picture), "--question", "what is shown in 1?", "--json")
    assert done.exit_code == EXIT_OK, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found["answer"], str)
    assert found["similarity"].keys() == {"Shapes", "Colours"}
    assert found["selected"][-1] == max(found["similarity"], key=found["similarity"].get)


def test_predict_gives_a_test_sample_the_evaluations_answer(run: dict[str, Any], call: Call, folder: Path) -> None:
    lines = (folder / run["run"] / "eval" / "after-02" / "Shapes.jsonl").read_text().splitlines()
    scored = json.loads(lines[3])  # every fourth sample has no image
    done = call("predict", run["run"], "--question", scored["question"], "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["answer"], found["selected"]) == (scored["prediction"], scored["selected"])


def test_predict_refuses_a_file_that_is_no_image(run: dict[str, Any], call: Call) -> None:
    done = call("predict", run["run"], "--image", "tiny.yaml", "--question", "what?")
    assert done.exit_code == EXIT_USER
    assert "'tiny.yaml' is not a readable image" in done.stderr


def test_export_writes_the_pool_and_what_it_belongs_to(run: dict[str, Any], call: Call, folder: Path) -> None:
    from pipeline.prompts.pool import PromptPool

    done = call("export", run["run"], "adapter")
    assert done.exit_code == EXIT_OK, done.stderr
    pool = PromptPool.load(folder / "adapter" / "prompts.safetensors")
    meta = json.loads((folder / "adapter" / "adapter.json").read_text())
    assert pool.names == meta["sets"] == ["Shapes", "Colours"]
    assert tuple(pool.prompts.shape[:2]) == (2, 2)
    assert meta["method"]["gate"] == 0.1
    assert call("export", run["run"], "coin").exit_code == EXIT_USER


def test_export_writes_a_checkpoint_with_the_sets(run: dict[str, Any], call: Call, folder: Path) -> None:
    done = call("export", run["run"], "checkpoint", "--as", "vocabulary")
    assert done.exit_code == EXIT_OK, done.stderr
    listed = json.loads((folder / "checkpoint" / "prompt_sets.json").read_text())
    assert [len(ids) for ids in listed["sets"].values()] == [2, 2]
    assert (folder / "checkpoint" / "adapter" / "adapter.json").is_file()
    assert call("export", run["run"], "checkpoint", "--as", "vocabulary").exit_code == EXIT_USER


def test_the_page_that_a_run_writes_says_first_what_its_result_says(run: dict[str, Any], folder: Path) -> None:
    text = html.unescape((folder / run["run"] / "report.html").read_text("utf-8"))
    verdict = text[text.index('id="verdict"') : text.index('id="tiles"')]
    assert all(fault["sentence"] in verdict for fault in run["faults"])
    assert verdict.count("<li>") == len(run["faults"] or ["all were learned"])


def test_report_writes_the_page(run: dict[str, Any], call: Call, folder: Path) -> None:
    done = call("report", run["run"])
    assert done.exit_code == EXIT_OK, done.stderr
    assert (folder / run["run"] / "report.html").stat().st_size > 1000


@pytest.mark.slow
def test_a_run_whose_loaders_have_workers_saves_when_it_is_told_to_stop(run: dict[str, Any], folder: Path) -> None:
    """The launcher tells the workers too, and before their ranks."""
    target = folder / "told"
    changes = [f"run_dir={target}", "train.workers=1", "train.steps=500"]
    command = [sys.executable, "-m", "pipeline", "train", "tiny.yaml", *(p for c in changes for p in ("--set", c))]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with (folder / "told.log").open("w+") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        until = time.monotonic() + 240
        while not list(target.glob("stages/01-*/metrics.jsonl")):
            assert process.poll() is None and time.monotonic() < until, log.read()
            time.sleep(0.05)
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
        log.seek(0)
        assert code == EXIT_RESUMABLE, log.read()
    assert list(target.glob("stages/01-*/resume/step-*/state.json"))
    assert json.loads((target / "run.json").read_text())["status"] == "stopped"
    assert not psutil.wait_procs(started, timeout=20)[1]


def test_running_again_trains_nothing_and_gives_the_same_result(run: dict[str, Any], folder: Path) -> None:
    stages = sorted((folder / run["run"] / "stages").glob("*/prompts.safetensors"))
    before = [path.stat().st_mtime_ns for path in stages]
    again = program(folder, "run", "tiny.yaml", "--set", "train.processes=1")
    assert again["accuracy"] == run["accuracy"]
    assert [path.stat().st_mtime_ns for path in stages] == before


def test_a_run_folder_of_another_recipe_is_refused(run: dict[str, Any], call: Call) -> None:
    done = call("run", "tiny.yaml", "--set", "train.lr_prompt=0.5")
    assert done.exit_code == EXIT_USER
    assert "belongs to another recipe" in done.stderr
    assert "Traceback" not in done.stderr
