"""A stage is trained by its trainer alone: without a run, from its start or from where an attempt was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import Interrupted, UserError
from pipeline.methods import Stage
from pipeline.prompts.pool import PromptPool
from pipeline.ranks.shutdown import StopFlag
from pipeline.ranks.watchdog import Watchdog
from pipeline.ranks.world import init_world
from pipeline.runs.session import Session
from pipeline.sequence.engine import lmm_engine
from pipeline.sequence.stage import StageTrainer
from pipeline.sequence.stage_files import StageFiles
from pipeline.training.engine import Engine
from tests import tiny
from tests.training.worlds import KEY_WIDTH, make_pool, make_recipe, make_samples

STAGE = Stage("a", (0,))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llava(tmp_path_factory.mktemp("models") / "llava", tied=True)


@pytest.fixture(scope="module")
def engine(llava: Path) -> Engine:
    return lmm_engine(make_recipe(llava, train__deepspeed="ds_configs/zero0.json"), init_world(), KEY_WIDTH)


def trainer(llava: Path, folder: Path, engine: Engine, data: str = "drawn", **changes: Any) -> StageTrainer:
    recipe = make_recipe(llava, train__deepspeed="ds_configs/zero0.json", **changes)
    world = init_world()
    session = Session(folder, world, StopFlag(), Watchdog(world, None))
    parts: Any = [(*make_samples(8), None)]
    return StageTrainer(recipe, session, lambda: engine, parts, StageFiles(session, [("a", data)], {"clip": "one"}))


def test_a_stage_s_files_say_what_it_was_trained_on_and_hold_what_it_learned(
    llava: Path, tmp_path: Path, engine: Engine
) -> None:
    pool = make_pool(2)
    before = pool.prompts.clone()
    train = trainer(llava, tmp_path, engine)
    trained = train.train(0, STAGE, pool)
    assert [line.step for line in trained.history] == [1, 2, 3]
    assert torch.equal(trained.checkpoint.tensors["prompt"], engine.values()["prompt"])
    assert torch.equal(pool.prompts, before) and len(pool) == 2
    meta = json.loads((tmp_path / "stages" / "01-a" / "meta.json").read_text())
    assert (meta["clip"], meta["data"], meta["steps"], meta["task"]) == ("one", {"a": "drawn"}, 3, "a")
    again = train.files.restore(0, STAGE)
    assert again is not None and torch.equal(again.tensors["prompt"], trained.checkpoint.tensors["prompt"])
    with pytest.raises(UserError, match="another data"):
        trainer(llava, tmp_path, engine, "other").files.restore(0, STAGE)


def test_a_stage_that_was_stopped_goes_on_at_its_step_and_learns_the_same(
    llava: Path, tmp_path: Path, engine: Engine
) -> None:
    whole = trainer(llava, tmp_path / "whole", engine).train(0, STAGE, PromptPool())
    begun: list[str] = []
    stopped = trainer(llava, tmp_path / "stopped", engine)
    with pytest.raises(Interrupted, match="after step 1 of 3"):
        stopped.train(0, STAGE, PromptPool(), lambda: setattr(stopped.session.stop, "requested", True))
    assert stopped.files.restore(0, STAGE) is None
    going_on = trainer(llava, tmp_path / "stopped", engine)
    trained = going_on.train(0, STAGE, PromptPool(), lambda: begun.append("begun"))
    assert begun == ["begun"]
    assert [line.step for line in trained.history] == [2, 3]
    assert torch.equal(trained.checkpoint.tensors["prompt"], whole.checkpoint.tensors["prompt"])


def test_a_stage_begins_anew_after_other_earlier_sets(llava: Path, tmp_path: Path, engine: Engine) -> None:
    stopped = trainer(llava, tmp_path, engine)
    with pytest.raises(Interrupted):
        stopped.train(0, STAGE, PromptPool(), lambda: setattr(stopped.session.stop, "requested", True))
    trained = trainer(llava, tmp_path, engine).train(0, STAGE, make_pool(1))
    assert [line.step for line in trained.history] == [1, 2, 3]
