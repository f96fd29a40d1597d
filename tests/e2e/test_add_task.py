"""A task of one's own becomes the next stage of a finished run, and nothing that was learned changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_prep.own_task import NewTask, make_task
from pipeline.cli.commands import app
from pipeline.config.load import load_run
from pipeline.config.recipe import Recipe
from pipeline.data.held_out import held_out_rows
from pipeline.errors import EXIT_OK, EXIT_USER
from pipeline.methods.modalprompt import EarlierGate, ModalPromptOptions
from pipeline.sequence.run import run_sequence
from tests.e2e.own_task import make_mine
from tests.tiny_clip import picture

pytestmark = pytest.mark.e2e


def test_a_task_is_added_to_a_run_and_the_others_answer_as_before(make: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make(tasks=2, method__gate=0.0, data__validation_share=0.5)
    run_sequence(recipe)
    run = recipe.run_path
    before = {path.relative_to(run): path.read_bytes() for path in run.glob("stages/*/*") if "lock" not in path.name}
    make_mine(tmp_path)
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
    learned = result["learned"]
    lines = [json.loads(line) for line in (run / "eval" / "held-out-03" / "Mine.jsonl").open()]
    assert (learned["task"], learned["samples"], len(lines)) == ("Mine", 2, 2)
    assert learned["score"] == pytest.approx(100 * sum(line["score"] for line in lines) / 2)
    assert all("Mine" in line["selected"] for line in lines), "the task is told"
    train = json.loads((tmp_path / "own" / "instructions" / "Mine" / "train.json").read_text("utf-8"))
    ids = [entry["id"] for entry in train]
    assert {line["id"] for line in lines} == {ids[row] for row in held_out_rows(ids, 0.5)}
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
    shown = CliRunner().invoke(app, gated[:-1]).stdout.splitlines()
    assert shown[-2:] == [
        f"report: {run / 'report.html'}",
        f"next: python -m pipeline predict {run} --image FILE --question TEXT",
    ]
    again = CliRunner().invoke(app, ["add", str(run), "T0", "--root", str(tmp_path / "own")])
    assert again.exit_code == EXIT_USER


@pytest.fixture
def mine(tmp_path: Path) -> list[str]:
    """Options of `add` that name a task of one's own, which is made."""
    (tmp_path / "photos").mkdir()
    for number in range(8):
        (tmp_path / "photos" / f"{number}.png").write_bytes(picture(number + 50))
    table = tmp_path / "mine.csv"
    table.write_text("image,question,answer\n" + "".join(f"{n}.png,what is it?,thing {n}\n" for n in range(8)))
    make_task(NewTask("Mine", tmp_path / "own", max_new_tokens=3), tmp_path / "photos", table)
    return ["Mine", "--root", str(tmp_path / "own")]


def told(*arguments: str) -> tuple[dict[str, Any], str]:
    """The object on the last line of what a verb prints with --json, and everything it printed."""
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == EXIT_OK, done.stderr
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return content, done.stdout


def test_a_router_in_closed_form_foretells_what_is_measured(make: Callable[..., Recipe], mine: list[str]) -> None:
    recipe = make(
        tasks=2,
        method__router="random_ridge",
        method__gate=None,
        method__share=0.5,
        method__unfamiliar="zero_shot",
        data__validation_share=0.5,
    )
    run_sequence(recipe)
    run = recipe.run_path
    before = {path.relative_to(run): path.read_bytes() for path in run.glob("stages/*/*") if "lock" not in path.name}
    recipe_before = (run / "config.yaml").read_bytes()
    foretold, said = told("add", str(run), *mine, "--dry-run")
    assert "Expected interference" in said and "other sets" in said
    assert (run / "config.yaml").read_bytes() == recipe_before
    done, _ = told("add", str(run), *mine)
    shares = ("task", "samples", "inserted", "first", "changed")
    measured = [{name: effect[name] for name in shares} for effect in done["earlier"]]
    assert measured == [{name: effect[name] for name in shares} for effect in foretold["foretold"]]
    assert (done["advised"], done["own"]) == (foretold["advised"], foretold["own"])
    assert {path: (run / path).read_bytes() for path in before} == before
    lines = [json.loads(line) for line in (run / "eval" / "after-03" / "T0.jsonl").open()]
    assert all(sum(line["probability"]) == pytest.approx(1, abs=1e-4) for line in lines)
    assert all(not line["selected"] for line in lines if line["unfamiliar"])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "called unfamiliar" in page

    shared, _ = told("add", str(run), *mine, "--share", "1e-30")
    assert [effect["inserted"] for effect in shared["earlier"]] >= [effect["inserted"] for effect in done["earlier"]]
    config = load_run(run)
    assert isinstance(config.method, ModalPromptOptions)
    assert (config.method.share, config.method.earlier_gates) == (1e-30, (EarlierGate(stages=2, gate=None, share=0.5),))
    assert shared["accuracy"][:2] == done["accuracy"][:2]
    assert {path: (run / path).read_bytes() for path in before} == before


def test_what_add_cannot_change_is_refused_before_anything_is_written(
    make: Callable[..., Recipe], mine: list[str]
) -> None:
    recipe = make(tasks=2, method__gate=0.0)
    run_sequence(recipe)
    before = (recipe.run_path / "config.yaml").read_bytes()
    for options, sentence in {
        ("--gate", "0.1", "--share", "0.5"): "expected gate or share",
        ("--share", "0"): "greater than 0",
        ("--share", "0.5"): "--set method.unfamiliar=flag",
    }.items():
        refused = CliRunner().invoke(app, ["add", str(recipe.run_path), *mine, *options])
        assert refused.exit_code == EXIT_USER and sentence in refused.stderr, refused.stderr
        assert (recipe.run_path / "config.yaml").read_bytes() == before
