"""The command line: exit codes, sentences, JSON, and the ranks it starts."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from pipeline.cli.commands import app
from pipeline.config.load import load_recipe
from pipeline.config.paths import PROJECT
from pipeline.errors import EXIT_FAILURE, EXIT_OK, EXIT_RESUMABLE, EXIT_USER, Interrupted
from pipeline.ranks import launch
from pipeline.ranks.environment import is_distributed
from pipeline.ranks.environment import rank as rank_of
from pipeline.ranks.outcome import Outcome

VERBS = ["check", "prepare", "run", "train", "evaluate", "predict", "report", "export"]
VERBS += ["serve", "chat", "ls", "merge", "prune", "new-task", "add", "undo", "label"]


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def one_line_error(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in stderr
    return lines[0]


def test_the_verbs_are_those_of_the_contract() -> None:
    result = run("--help")
    assert result.exit_code == EXIT_OK
    for verb in VERBS:
        assert f" {verb} " in result.output


def test_the_python_module_is_the_same_program() -> None:
    done = python("run", "nanno")
    assert done.returncode == EXIT_USER
    assert "Did you mean 'nano'?" in one_line_error(done.stderr)
    assert done.stdout == ""


def test_an_unknown_verb_gets_the_nearest() -> None:
    result = run("rnu", "nano")
    assert result.exit_code == EXIT_USER
    assert "'run'" in result.output


def completed(*words: str, folder: Path) -> list[str]:
    """What bash offers for the last of the words, by the protocol of the script that --install-completion writes."""
    environment = os.environ | {
        "PYTHONPATH": str(PROJECT),
        "_PIPELINE_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["pipeline", *words]),
        "COMP_CWORD": str(len(words)),
    }
    command = [sys.executable, "-m", "pipeline"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("pre",), ["prepare", "predict"]),
        (("run", "nano_s"), ["nano_sequential"]),
        (("check", "nothing"), []),
        (("report", "runs/a"), ["runs/a1", "runs/a2"]),
        (("report", "runs/a1", "runs/a2"), ["runs/a2"]),
        (("chat", "ru"), ["runs/a1", "runs/a2", "runs/b"]),
        (("add", "elsewhere/"), ["elsewhere/c"]),
        (("run", "nano", "--set", "train.lr_p"), ["train.lr_prompt=", "train.lr_projector="]),
        (("run", "nano", "--set", "data.tasks.Count.limit_te"), ["data.tasks.Count.limit_test="]),
        (("run", "nano", "--set", "train.schedule=c"), ["train.schedule=constant", "train.schedule=cosine"]),
        (("check", "base2new_nano", "--set", "data.protocol=b"), ["data.protocol=base_to_new"]),
        (("add", "runs/a1", "Sh"), ["Shelf"]),
        (("prune", "elsewhere/c", "Co"), ["Colours", "Count"]),
    ],
    ids=" ".join,
)
def test_a_shell_completes_verbs_recipes_and_runs(tmp_path: Path, words: tuple[str, ...], offered: list[str]) -> None:
    for run in ("runs/a1", "runs/a2", "runs/b", "elsewhere/c"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.yaml").write_text("name: a")
    (tmp_path / "runs" / "no-run").mkdir()
    (tmp_path / "data" / "own" / "instructions" / "Shelf").mkdir(parents=True)
    (tmp_path / "elsewhere" / "c" / "adapter.json").write_text('{"sets": ["Colours", "Count", "Boxes"]}')
    assert completed(*words, folder=tmp_path) == offered


def test_the_installed_command_is_the_one_that_completion_asks() -> None:
    scripts = (PROJECT / "pyproject.toml").read_text().partition("[project.scripts]\n")[2].splitlines()
    command, _, target = scripts[0].replace('"', "").partition(" = ")
    module, _, function = target.partition(":")
    assert command == "pipeline" and getattr(importlib.import_module(module), function).__module__ == "pipeline.cli"


def test_an_unknown_option_is_a_usage_error() -> None:
    assert run("run", "nano", "--sed", "1").exit_code == EXIT_USER


@pytest.mark.parametrize("verb", ["check", "prepare", "run", "train"])
def test_a_wrong_field_ends_with_2_and_one_sentence(verb: str) -> None:
    result = run(verb, "nano", "--set", "train.lr_promt=1")
    assert result.exit_code == EXIT_USER
    assert "Did you mean 'lr_prompt'?" in one_line_error(result.stderr)


@pytest.mark.parametrize(
    "arguments",
    [("evaluate",), ("report",), ("predict", "--question", "What?"), ("export", "adapter")],
    ids=lambda arguments: arguments[0],
)
def test_a_folder_that_is_no_run_ends_with_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    verb, *rest = arguments
    result = run(verb, str(tmp_path / "nothing"), *rest)
    assert result.exit_code == EXIT_USER
    assert "does not exist" in one_line_error(result.stderr)


def test_unprepared_data_names_the_command_that_prepares_it(tmp_path: Path) -> None:
    result = run("run", "nano", "--set", f"data.prepared={tmp_path}")
    assert result.exit_code == EXIT_USER
    assert "run `python -m pipeline prepare nano` first" in one_line_error(result.stderr)


def test_an_interruption_ends_with_75(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise Interrupted("stopped after stage 2 of 6; the same command goes on.")

    monkeypatch.setattr("pipeline.config.load.load_recipe", interrupted)
    result = run("run", "nano")
    assert result.exit_code == EXIT_RESUMABLE
    assert result.stderr == "stopped: stopped after stage 2 of 6; the same command goes on.\n"


def test_anything_else_ends_with_1_and_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("pipeline.config.load.load_recipe", broken)
    result = run("run", "nano")
    assert result.exit_code == EXIT_FAILURE
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError: a bug" in result.stderr


def test_json_is_one_object_on_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.prepare.prepare", lambda recipe, **options: print("noise") or {"splits": [1, 2]})
    result = run("prepare", "nano", "--json")
    assert result.exit_code == EXIT_OK
    assert json.loads(result.stdout.splitlines()[-1]) == {"splits": [1, 2]}


def test_check_lists_everything_that_is_wrong(tmp_path: Path) -> None:
    result = run("check", "nano", "--set", f"data.prepared={tmp_path}", "--set", "train.deepspeed=zero9.json")
    assert result.exit_code == EXIT_USER
    assert "zero9.json" in result.stderr
    assert "prepare nano" in result.stderr


def test_a_world_size_that_does_not_divide_is_refused_before_any_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sequence.prepared.require_prepared", lambda recipe, name: None)
    monkeypatch.setattr("pipeline.ranks.launch.launch", lambda *_: pytest.fail("ranks were started"))
    result = run("run", "nano", "--set", "train.processes=3", "--set", "train.global_batch=16")
    assert result.exit_code == EXIT_USER
    assert "start 1, 2, 4, 8, 16 ranks" in one_line_error(result.stderr)


def test_the_deepspeed_launchers_own_option_is_accepted() -> None:
    assert "nanno" in run("--local_rank=0", "run", "nanno").stderr


@pytest.mark.parametrize(
    ("environment", "is_one", "rank"),
    [
        ({}, False, 0),
        ({"RANK": "1", "WORLD_SIZE": "2"}, True, 1),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, True, 3),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False, 0),
    ],
)
def test_a_rank_knows_that_it_is_one(environment: dict[str, str], is_one: bool, rank: int) -> None:
    assert (is_distributed(environment), rank_of(environment)) == (is_one, rank)


def test_processes_default_to_one_without_accelerators() -> None:
    recipe = load_recipe("nano", ["train.processes=null"])
    assert launch.local_processes(recipe.train.processes) == 1
    assert launch.local_processes(load_recipe("nano").train.processes) == 2


@pytest.mark.parametrize(
    ("codes", "launcher_code", "stopped", "expected"),
    [
        ([0, 0], 0, False, EXIT_OK),
        ([75, 2], 2, False, EXIT_USER),
        ([75, 1], 1, False, EXIT_FAILURE),
        ([75, 75], 75, False, EXIT_RESUMABLE),
        ([], 250, False, EXIT_FAILURE),
        ([], 1, True, EXIT_RESUMABLE),
        ([0], 250, False, EXIT_FAILURE),
    ],
)
def test_the_launchs_code_follows_from_its_ranks(
    codes: list[int], launcher_code: int, stopped: bool, expected: int
) -> None:
    outcomes = [Outcome(code, result={} if code == 0 else None) for code in codes]
    assert launch.combined(outcomes, launcher_code, stopped).code == expected


# Runs in the ranks instead of `pipeline`: the launcher is real, the work is not.
RANK = """
import os, sys, time
from pathlib import Path
from pipeline.ranks.environment import rank
from pipeline.ranks.outcome import Outcome, leave_outcome
Path(f"started-{rank()}").touch()
if sys.argv[1] == "wait":
    time.sleep(60)
leave_outcome(Outcome(0, result={"ranks": os.environ["WORLD_SIZE"], "rank": rank()}))
"""


@pytest.fixture
def rank_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "rank_module.py").write_text(RANK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    return "rank_module"


@pytest.mark.gloo
def test_the_result_of_rank_0_comes_back_through_the_launcher(rank_module: str) -> None:
    outcome = launch.launch(["work"], 2, module=rank_module)
    assert outcome == Outcome(EXIT_OK, result={"ranks": "2", "rank": 0})


@pytest.mark.gloo
def test_a_users_error_in_a_rank_survives_the_launcher() -> None:
    outcome = launch.launch(["run", "nanno"], 2)
    assert outcome.code == EXIT_USER
    assert "unknown recipe 'nanno'" in str(outcome.error)


@pytest.mark.gloo
def test_a_launch_that_is_hung_up_is_resumable_and_leaves_no_rank_behind(rank_module: str, tmp_path: Path) -> None:
    program = (
        f"from pipeline.ranks.launch import launch; raise SystemExit(launch(['wait'], 2, module='{rank_module}').code)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    waited_until = time.monotonic() + 90
    while len(list(tmp_path.glob("started-*"))) < 2 and time.monotonic() < waited_until:
        time.sleep(0.1)
    ranks = [child for child in psutil.Process(parent.pid).children(recursive=True) if "wait" in child.cmdline()]
    parent.send_signal(signal.SIGHUP)
    assert parent.wait(60) == EXIT_RESUMABLE
    assert ranks
    assert not psutil.wait_procs(ranks, timeout=5)[1]
