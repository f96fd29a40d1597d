"""What one rank raises reaches the others with its class, and ends them with the same exit code."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EXIT_FAILURE, MissingExtra, PipelineError, UserErrors
from pipeline.ranks.environment import free_port
from tests.processes import PROJECT
from tests.ranks.failing import ERRORS

pytestmark = pytest.mark.gloo


def two_ranks(*arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """How `tests.ranks.failing` ends on two ranks."""
    shared = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.ranks.failing", *arguments]
    started = [
        subprocess.Popen(
            command,
            cwd=PROJECT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(command, process.returncode, out, err)
        for process, (out, err) in zip(started, said, strict=True)
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank caught, by the name of the error."""
    folder = tmp_path_factory.mktemp("errors")
    for done in two_ranks(str(folder)):
        assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(2)]


@pytest.mark.parametrize("name", ["user", "users", "extra", "stopped", "memory", "diverged", "attributes"])
def test_an_error_of_the_project_is_the_same_on_all_ranks(found: list[dict[str, Any]], name: str) -> None:
    assert found[0][name] == found[1][name] == found[0][f"together {name}"] == found[1][f"together {name}"]
    assert found[0][name]["class"] == type(ERRORS[name]()).__name__


def test_the_cause_is_named_on_the_other_ranks(found: list[dict[str, Any]]) -> None:
    assert found[0]["cause"]["cause"] == "'prompts'"
    assert found[1]["cause"] == {**found[0]["cause"], "cause": "KeyError: 'prompts'"}


@pytest.mark.parametrize(("name", "kind"), [("unpicklable", "PipelineError"), ("local class", "Interrupted")])
def test_what_cannot_be_pickled_keeps_its_nearest_class(found: list[dict[str, Any]], name: str, kind: str) -> None:
    assert found[1][name]["class"] == kind
    assert {key: found[1][name][key] for key in ("text", "code")} == {
        key: found[0][name][key] for key in ("text", "code")
    }


def test_a_full_disk_is_one_sentence_on_the_other_ranks(found: list[dict[str, Any]]) -> None:
    assert found[0]["full disk"]["class"] == found[1]["together full disk"]["class"] == "OSError"
    for other in (found[1]["full disk"], found[0]["together full disk"]):
        assert (other["class"], other["code"]) == ("Unwritable", EXIT_FAILURE)
        assert other["text"].startswith("A file 'runs/x/run.json' could not be written (No space left on device).")


def test_a_bug_is_named_on_the_other_ranks(found: list[dict[str, Any]]) -> None:
    assert found[0]["bug"]["class"] == "ZeroDivisionError"
    assert found[1]["bug"]["class"] == "RankFailed"
    assert found[1]["bug"]["text"] == (
        "Rank 0 failed (ZeroDivisionError: division by zero); its output has the traceback."
    )


def test_all_ranks_end_with_the_same_exit_code_and_no_traceback(tmp_path: Path) -> None:
    done = two_ranks(str(tmp_path), "main-rank", "full disk")
    assert [rank.returncode for rank in done] == [EXIT_FAILURE] * 2
    sentences = [rank.stderr.strip().splitlines()[-1].partition(": ")[2] for rank in done]
    assert sentences[0] == sentences[1]
    assert not any("Traceback" in rank.stderr for rank in done)


@pytest.mark.parametrize("error", [UserErrors(["one.", "two."]), MissingExtra("deepspeed", "train")])
def test_an_error_is_pickled_with_all_that_it_says(error: PipelineError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.__dict__) == (type(error), str(error), error.__dict__)
