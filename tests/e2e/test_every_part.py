"""Modules of any part: merged, pruned and side by side in one batch; and whole runs of the methods that take any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.adapter.answering import Answerer, Question
from pipeline.adapter.edit import merge, prune
from pipeline.adapter.format import read_adapter
from pipeline.adapter.from_run import export
from pipeline.adapter.load import source_of
from pipeline.config.recipe import Recipe
from pipeline.errors import UserError
from pipeline.sequence.run import run_sequence
from tests import tiny
from tests.e2e.conftest import MakeRecipe
from tests.joining import require_same_answers_in_any_batch
from tests.methods.small import PARTS, method_fields

TOKENS = 5
SHARED = ("core", "dual_prefix")  # parts whose modules have something in common
FAST = ("components", "dual_prefix")
EVERY_PART = [pytest.param(part, marks=() if part in FAST else pytest.mark.slow) for part in PARTS]


def trained(make: MakeRecipe, folder: Path, name: str, tasks: int = 3, **changes: Any) -> Recipe:
    """A run that is trained and not evaluated."""
    recipe = make(method=method_fields(name), tasks=tasks, train__lr_prompt=0.3, run_dir=str(folder), **changes)
    run_sequence(recipe, stages="train")
    return recipe


@pytest.mark.parametrize("part", EVERY_PART)
def test_modules_are_merged_pruned_and_answer_side_by_side(make: MakeRecipe, tmp_path: Path, part: str) -> None:
    recipe = trained(make, tmp_path / "run", f"independent {part}")
    whole, first, last = (tmp_path / name for name in ("whole", "first", "last"))
    export(recipe.run_path, whole)
    prune(whole, ["T2"], first)
    prune(whole, ["T0", "T1"], last)
    merge([first, last], tmp_path / "merged")
    pools = [read_adapter(folder).pool for folder in (whole, tmp_path / "merged")]
    assert pools[0].names == pools[1].names == ["T0", "T1", "T2"]
    assert pools[0].tensors.keys() == pools[1].tensors.keys() and pools[0].common.keys() == pools[1].common.keys()
    assert all(torch.equal(pools[1].tensors[name], value) for name, value in pools[0].tensors.items())
    assert all(torch.equal(pools[1].common[name], value) for name, value in pools[0].common.items())
    assert bool(pools[0].common) is (part in SHARED)

    answerer = Answerer(source_of(whole))
    pictures = (tiny.png((200, 30, 30)), None)
    asked = [Question("what is it?", image, f"T{number}") for image in pictures for number in range(3)]
    require_same_answers_in_any_batch(answerer, asked, TOKENS)
    answers = [answer.text for answer in answerer.answer(asked, TOKENS)]
    assert len(set(answers[:3])) > 1 or len(set(answers[3:])) > 1, "the modules make no difference"
    pruned = Answerer(source_of(first))
    kept = [number for number, question in enumerate(asked) if question.task != "T2"]
    assert [answer.text for answer in pruned.answer([asked[n] for n in kept], TOKENS)] == [answers[n] for n in kept]
    with pytest.raises(UserError, match=r"needs the task; set task \(--task\) to one of T0, T1, T2"):
        answerer.answer([Question("what is it?")])


@pytest.mark.parametrize("part", SHARED)
def test_modules_of_other_bases_or_shared_prefixes_are_not_merged(make: MakeRecipe, tmp_path: Path, part: str) -> None:
    for seed in (1, 2):
        export(trained(make, tmp_path / str(seed), f"independent {part}", 2, seed=seed).run_path, tmp_path / f"a{seed}")
        prune(tmp_path / f"a{seed}", [f"T{seed - 1}"], tmp_path / f"b{seed}")
    with pytest.raises(UserError, match="other tensors in common, which belong to one pool only"):
        merge([tmp_path / "b1", tmp_path / "b2"], tmp_path / "both")


def test_modules_that_would_never_answer_are_not_merged(make: MakeRecipe, tmp_path: Path) -> None:
    export(trained(make, tmp_path / "run", "lora", 2).run_path, tmp_path / "whole")
    for number in (0, 1):
        prune(tmp_path / "whole", [f"T{1 - number}"], tmp_path / str(number))
    with pytest.raises(UserError, match="the method lora would answer every question with T1 of the merged sets"):
        merge([tmp_path / "0", tmp_path / "1"], tmp_path / "both")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["joint", "sequential"])
def test_the_other_references_take_any_part(make: MakeRecipe, tmp_path: Path, name: str, part: str) -> None:
    recipe = make(method=method_fields(f"{name} {part}"), tasks=2, run_dir=str(tmp_path / "run"))
    matrix = run_sequence(recipe)
    assert [len([x for x in row if x is not None]) for row in matrix["accuracy"]][-1] == 2
    export(recipe.run_path, tmp_path / "adapter")
    answerer = Answerer(source_of(tmp_path / "adapter"))
    asked = [Question("what is it?", tiny.png((200, 30, 30))), Question("what is it?")]
    require_same_answers_in_any_batch(answerer, asked, TOKENS)
