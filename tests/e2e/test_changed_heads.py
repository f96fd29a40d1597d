"""A run whose answer heads change after it was finished: what its folder says then, and what `undo` brings back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import load_run
from pipeline.config.recipe import Recipe
from pipeline.errors import Interrupted, UserError
from pipeline.runs.layout import MATRIX, REPLACING_HEADS
from pipeline.runs.state import read_state
from pipeline.sequence.again import begin_again
from pipeline.sequence.opened import OpenRun
from pipeline.sequence.run import evaluate_run, run_sequence
from pipeline.sequence.undo import undo
from tests.e2e.test_answer_head import MIX, PLAIN, coloured, recipe, stages

__all__ = ["coloured"]  # a fixture


@pytest.fixture
def plain(coloured: Path, tmp_path: Path) -> Recipe:
    """The recipe of a finished run without heads, which knows nothing."""
    made = recipe(coloured, tmp_path, method=PLAIN)
    assert run_sequence(made)["accuracy"][-1] == [0.0, 0.0]
    return made


def with_heads(made: Recipe, **train: Any) -> Recipe:
    fields = made.model_dump()
    return Recipe.model_validate(
        {**fields, "method": {**fields["method"], "answer_head": "ridge"}, "train": {**fields["train"], **train}}
    )


def has_heads(run: Path) -> list[bool]:
    return [MIX in found for found in stages(run)]


def test_scores_without_heads_are_not_those_of_a_run_that_has_them(plain: Recipe) -> None:
    run = plain.run_path
    run_sequence(with_heads(plain), stages="train")
    assert read_state(run)["status"] == "trained" and not (run / MATRIX).exists()
    run_sequence(with_heads(plain), until=1)
    assert json.loads((run / MATRIX).read_text())["accuracy"] == [[100.0, None]]
    assert min(evaluate_run(run)["accuracy"][-1]) > 85
    assert read_state(run)["status"] == "done"


def test_of_the_recipe_that_gives_a_run_heads_nothing_else_is_recorded(plain: Recipe) -> None:
    run_sequence(with_heads(plain, save_steps=7), stages="train")
    found = load_run(plain.run_path)
    assert found.method.keeps_answer_heads and found.train.save_steps == plain.train.save_steps


def test_a_call_that_gives_heads_stops_between_two_stages(plain: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.sequence import adopt_heads

    rewrite, rewritten = adopt_heads._rewrite, list[int]()

    def told_to_stop_after(run: OpenRun, index: int, *rest: Any) -> None:
        rewrite(run, index, *rest)
        rewritten.append(index)

    with monkeypatch.context() as patched:
        patched.setattr(adopt_heads, "_rewrite", told_to_stop_after)
        patched.setattr("pipeline.runs.session.Session.told_to_stop", lambda _: bool(rewritten))
        with pytest.raises(Interrupted, match="while answer heads were changed"):
            run_sequence(with_heads(plain), stages="train")
    assert has_heads(plain.run_path) == [True, False] and (plain.run_path / REPLACING_HEADS).exists()
    run_sequence(with_heads(plain), stages="train")
    assert has_heads(plain.run_path) == [True, True]


def test_a_stage_that_undo_brings_back_gets_the_heads_that_the_run_has_now(plain: Recipe) -> None:
    run = plain.run_path
    begin_again(run, "T1", ["train.steps=3"], {})
    run_sequence(load_run(run), stages="train")
    run_sequence(with_heads(load_run(run)), stages="train")
    undo(run)
    assert load_run(run).method.keeps_answer_heads and load_run(run).train.steps == 2
    assert min(evaluate_run(run)["accuracy"][-1]) > 85
    assert has_heads(run) == [True, True]


def test_a_stage_that_undo_brings_back_keeps_what_the_router_of_the_run_needs(plain: Recipe) -> None:
    run = plain.run_path
    begin_again(run, "T1", ["train.steps=3"], {})
    run_sequence(load_run(run), stages="train")
    other = load_run(run).model_dump()
    other["method"]["router"] = "mean"
    run_sequence(Recipe.model_validate(other), stages="train")
    undo(run)
    evaluate_run(run)
    assert load_run(run).method.router == "mean"  # type: ignore[attr-defined]
    assert all("prototype" in found for found in stages(run))


def test_what_is_done_with_unfamiliar_questions_is_recorded_when_it_changes(plain: Recipe) -> None:
    other = plain.model_dump()
    other["method"]["unfamiliar"] = "flag"
    run_sequence(Recipe.model_validate(other))
    assert load_run(plain.run_path).method.unfamiliar == "flag"  # type: ignore[attr-defined]


def test_no_attempt_begins_beside_heads_that_are_half_replaced(plain: Recipe) -> None:
    (plain.run_path / REPLACING_HEADS).touch()  # as a call that was killed leaves it
    with pytest.raises(UserError, match=r"answer heads of .* are being replaced, or a process was killed"):
        begin_again(plain.run_path, "T1", ["train.steps=3"], {})
    run_sequence(plain, stages="train")
    begin_again(plain.run_path, "T1", ["train.steps=3"], {})
