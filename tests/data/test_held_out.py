"""Which samples are held out follows from their ids alone, and what is held out is not trained with."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data_prep.prepare import prepare
from pipeline.config.load import load_recipe, load_run
from pipeline.config.recipe import Recipe
from pipeline.data.held_out import held_out_rows, other_rows
from pipeline.data.stage_data import StageData
from pipeline.errors import UserError
from pipeline.ranks.world import World
from pipeline.runs.claim import claim_run
from pipeline.sequence.data import RunData, open_data
from tests import tiny_clip
from tests.e2e.conftest import recipe_on

RECORDED = ["s223", "s717", "s856", "s915", "s958"]
ALONE = World(0, 1, 0, torch.device("cpu"))
IDS = [f"s{number}" for number in range(1_000)]


def held_out(ids: list[str], share: float, most: int = 500) -> set[str]:
    return {ids[row] for row in held_out_rows(ids, share, most)}


def test_the_order_of_the_records_changes_nothing() -> None:
    shuffled = random.Random(0).sample(IDS, len(IDS))
    assert held_out(shuffled, 0.05) == held_out(IDS, 0.05)
    assert len(held_out(IDS, 0.05)) == 50


def test_a_larger_share_holds_out_the_same_samples_and_more() -> None:
    assert held_out(IDS, 0.02) < held_out(IDS, 0.05) < held_out(IDS, 0.3)


def test_no_more_are_held_out_than_the_most() -> None:
    assert len(held_out(IDS, 0.5, most=30)) == 30


@pytest.mark.parametrize(("count", "share"), [(6, 0.05), (1_000, 0.0)])
def test_few_samples_and_no_share_hold_none_out(count: int, share: float) -> None:
    assert len(held_out_rows(IDS[:count], share)) == 0


def test_rows_and_the_others_are_all_rows_in_order() -> None:
    rows = held_out_rows(IDS, 0.2)
    others = other_rows(len(IDS), rows)
    assert np.array_equal(np.sort(np.concatenate([rows, others])), np.arange(len(IDS)))
    assert (np.diff(rows) > 0).all() and (np.diff(others) > 0).all()


def test_the_hash_is_that_of_every_version() -> None:
    assert sorted(held_out(IDS, 0.005)) == RECORDED


# ------------------------------------------------------------------ of prepared data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("held-out")
    tiny_clip.save_clip(root / "clip")
    for task in ("T0", "T1"):
        tiny_clip.save_coin(root / "coin", task, train=20, test=4)
    prepare(recipe_on(root, root / "unused", 2), progress=False)
    return root


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    return lambda **changes: recipe_on(folder, tmp_path, 2, **changes)


def opened(recipe: Recipe) -> RunData:
    return open_data(recipe, ALONE)


def test_training_and_held_out_samples_are_all_samples_with_their_own_keys(make: Callable[..., Recipe]) -> None:
    whole, data = (opened(make(data__validation_share=share)) for share in (0, 0.25))
    for number in range(2):
        everything = StageData([whole.train[number]])
        places = {identity: place for place, identity in enumerate(everything.ids)}
        train, held = StageData([data.train[number]]), StageData([data.validation[number]])
        assert (len(train), len(held), len(everything)) == (15, 5, 20)
        assert not set(train.ids) & set(held.ids) and {*train.ids, *held.ids} == set(everything.ids)
        for part in (train, held):
            rows = torch.tensor([places[identity] for identity in part.ids])
            assert [part[index].id for index in range(len(part))] == list(part.ids)
            assert [part.text(index).id for index in range(len(part))] == list(part.ids)
            assert torch.equal(part.keys.image[torch.arange(len(part))], everything.keys.image[rows])
            assert torch.equal(torch.cat(list(part.keys.text.split(4))), everything.keys.text[rows])
            assert part.keys.has_image.tolist() == [part[index].image is not None for index in range(len(part))]
            lengths = [len(part[index].question) + len(part[index].answer) for index in range(len(part))]
            assert (part.lengths() % (max(lengths) + 1)).tolist() == lengths


def test_other_tasks_seeds_and_a_limit_on_another_task_change_nothing(make: Callable[..., Recipe]) -> None:
    recipe = make(data__validation_share=0.25)
    alone = recipe.model_copy(
        update={"seed": 3, "data": recipe.data.model_copy(update={"tasks": recipe.data.tasks[1:]})}
    )
    assert list(opened(recipe).validation[1][0].ids) == list(opened(alone).validation[0][0].ids)


def test_the_limit_counts_what_is_held_out(make: Callable[..., Recipe]) -> None:
    recipe = make(data__validation_share=0.25, data__validation_most=3)
    tasks = tuple(task.model_copy(update={"limit_train": 8}) for task in recipe.data.tasks)
    data = opened(recipe.model_copy(update={"data": recipe.data.model_copy(update={"tasks": tasks})}))
    train, held = StageData([data.train[0]]), StageData([data.validation[0]])
    assert (len(train), len(held)) == (6, 2)
    assert {*train.ids, *held.ids} == {f"T0-{number}" for number in range(8)}


def test_several_tasks_stand_one_behind_the_other(make: Callable[..., Recipe]) -> None:
    data = opened(make(data__validation_share=0.25))
    joint, parts = StageData(data.train), [StageData([part]) for part in data.train]
    assert list(joint.ids) == [identity for part in parts for identity in part.ids]
    expected = torch.cat([part.keys.image[torch.arange(len(part))] for part in parts])
    assert torch.equal(joint.keys.image[torch.arange(len(joint))], expected)
    assert torch.equal(torch.cat(list(joint.keys.image.split(7))), expected)


def test_training_samples_stand_in_where_none_are_held_out(make: Callable[..., Recipe]) -> None:
    held, told = opened(make(data__validation_share=0.25)).for_choices(0)
    assert told and len(held[0]) == 5
    part, told = opened(make(data__validation_share=0, data__validation_most=7)).for_choices(0)
    assert not told and len(part[0]) == 7


# ------------------------------------------------------------------ of runs from before


def without_the_field(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    for name in ("validation_share", "validation_most"):
        config["data"].pop(name)
    (run / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    (run / "run.json").write_text("{}", "utf-8")


def test_a_run_from_before_has_trained_on_all_its_samples(make: Callable[..., Recipe]) -> None:
    recipe = make()
    assert recipe.data.validation_share == 0.05
    run = claim_run(recipe)
    without_the_field(run)
    assert load_run(run).data.validation_share == 0
    again = load_recipe(run / "config.yaml", [f"run_dir={run}"])
    assert again.data.validation_share == 0 and claim_run(again) == run
    with pytest.raises(UserError, match=r"data\.validation_share: 0\.0 there, 0\.05 now"):
        claim_run(recipe)
