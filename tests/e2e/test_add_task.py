"""A task of one's own becomes the next stage of a finished run, and nothing that was learned changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.own_task import make_task
from pipeline.cli.commands import app
from pipeline.config.load import load_run
from pipeline.config.recipe import Recipe
from pipeline.errors import EXIT_OK, EXIT_USER
from pipeline.methods.modalprompt import EarlierGate, ModalPromptOptions
from pipeline.sequence.run import run_sequence
from tests.tiny_clip import picture

pytestmark = pytest.mark.e2e


def test_a_task_is_added_to_a_run_and_the_others_answer_as_before(make: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make(tasks=2, method__gate=0.0, data__validation_share=0.5)
    run_sequence(recipe)
    run = recipe.run_path
    before = {path.relative_to(run): path.read_bytes() for path in run.glob("stages/*/*") if "lock" not in path.name}
    (tmp_path / "photos").mkdir()
    for number in range(6):
        (tmp_path / "photos" / f"{number}.png").write_bytes(picture(number + 50))
    table = tmp_path / "mine.csv"
    table.write_text("image,question,answer\n" + "".join(f"{n}.png,what is it?,thing {n}\n" for n in range(6)))
    make_task("Mine", tmp_path / "photos", table, tmp_path / "own", max_new_tokens=3)
    refused = CliRunner().invoke(app, ["add", str(run), "Mien", "--root", str(tmp_path / "own")])
    assert refused.exit_code == EXIT_USER and "Did you mean 'Mine'" in refused.stderr
    recipe_before = (run / "config.yaml").read_bytes()
    asked = CliRunner().invoke(app, ["add", str(run), "Mine", "--root", str(tmp_path / "own"), "--dry-run", "--json"])
    assert asked.exit_code == EXIT_OK, asked.stderr
    foretold = json.loads(asked.stdout.splitlines()[-1])["foretold"]
    assert [effect["task"] for effect in foretold] == ["T0", "T1"] and foretold[0]["after"] is None
    assert [(effect["samples"], effect["held_out"]) for effect in foretold] == [(3, True)] * 2
    assert (run / "config.yaml").read_bytes() == recipe_before and not (run / "stages" / "03-Mine").exists()
    done = CliRunner().invoke(app, ["add", str(run), "Mine", "--root", str(tmp_path / "own"), "--json"])
    assert done.exit_code == EXIT_OK, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tasks"] == ["T0", "T1", "Mine"]
    assert [score is None for score in result["accuracy"][2]] == [False] * 3
    assert {path: (run / path).read_bytes() for path in before} == before
    assert len(result["majority"]) == 3
    for number, effect in enumerate(result["earlier"]):
        assert (effect["samples"], effect["held_out"]) == (3, True)
        assert (effect["before"], effect["after"]) == (result["accuracy"][1][number], result["accuracy"][2][number])
    assert "Mine" in (run / "report.html").read_text(encoding="utf-8")
    rows = result["accuracy"][:2]
    answers = {path: path.read_bytes() for path in (run / "eval").glob("after-0[12]/*.jsonl")}
    gated = ["add", str(run), "Mine", "--root", str(tmp_path / "own"), "--gate", "2", "--json"]
    done = CliRunner().invoke(app, gated)
    assert done.exit_code == EXIT_OK, done.stderr
    # A gate of 2 leaves nothing out; what was trained stays, and so does what was measured before.
    result = json.loads(done.stdout.splitlines()[-1])
    assert [effect["inserted"] for effect in result["earlier"]] == [100.0, 100.0]
    last = [json.loads(line) for line in (run / "eval" / "after-03" / "T0.jsonl").open()]
    assert all(len(line["selected"]) == 3 for line in last)
    assert result["accuracy"][:2] == rows
    assert {path: path.read_bytes() for path in answers} == answers
    config = load_run(run)
    assert isinstance(config.method, ModalPromptOptions)
    assert (config.method.gate, config.method.earlier_gates) == (2.0, (EarlierGate(stages=2, gate=0.0),))
    assert {path: (run / path).read_bytes() for path in before} == before
    again = CliRunner().invoke(app, ["add", str(run), "T0", "--root", str(tmp_path / "own")])
    assert again.exit_code == EXIT_USER
