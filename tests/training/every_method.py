"""Trains two stages of two steps of many methods in one process per rank; run as a script by the tests."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from pipeline.config.recipe import Recipe
from pipeline.errors import Interrupted
from pipeline.methods import make_method
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.stage_files import add_stage
from pipeline.ranks.launch import end_as_rank
from pipeline.ranks.shutdown import StopFlag
from pipeline.ranks.watchdog import Watchdog
from pipeline.ranks.world import World, close_world, init_world
from pipeline.runs.session import Session
from pipeline.sequence.engine import lmm_engine
from pipeline.sequence.stage import StageTrainer
from pipeline.sequence.stage_files import StageFiles
from tests.training.worlds import KEY_WIDTH, make_recipe, make_samples

TASKS = ("a", "b")
# AdamW divides a gradient by its size: with this epsilon those that are only rounding do not become whole steps.
EPSILON = 1e-3


def recipe_of(model: Path, method: dict[str, Any], zero: int, **changes: Any) -> Recipe:
    """Two steps per stage of two tasks on the tiny model, each step a checkpoint."""
    fields = {
        "data": {"source": "coin", "root": "none", "tasks": [{"name": task} for task in TASKS]},
        "method": method,
        "train__steps": 2,
        "train__eps": EPSILON,
        "train__save_steps": 1,
        "train__deepspeed": f"ds_configs/zero{zero}.json",
    }
    return make_recipe(model, **{**fields, **changes})


def train(recipe: Recipe, world: World, folder: Path, stops: bool = False) -> None:
    """Leave the stages in the folder; with `stops` each is stopped after its first step and resumed by a new engine."""
    files_of, parts = [(task, "drawn") for task in TASKS], list[Any]()
    for seed in range(len(TASKS)):  # answers of different lengths, one question without an image
        samples, keys = make_samples(8, seed=seed, text_only=(2,))
        parts.append((samples, keys, None))
    pool = PromptPool()
    engine = lmm_engine(recipe, world, KEY_WIDTH)

    def trainer(stop: bool) -> StageTrainer:
        session = Session(folder, world, StopFlag(stop), Watchdog(world, None))
        return StageTrainer(recipe, session, lambda: engine, parts, StageFiles(session, files_of, {}))

    for index, stage in enumerate(make_method(recipe.method).stages(TASKS)):
        if stops:
            with contextlib.suppress(Interrupted):
                trainer(True).train(index, stage, pool)
                raise AssertionError(f"stage {stage.name} was not stopped")
            engine = lmm_engine(recipe, world, KEY_WIDTH)
        add_stage(pool, stage.name, trainer(False).train(index, stage, pool).checkpoint.tensors)


def main(job_file: str) -> None:
    """Do a job {"model", "out", "methods": {name: fields}, "zeros": [...]}; stages are left in OUT/zeroN/NAME."""
    job = json.loads(Path(job_file).read_text())
    world = init_world()
    for name, method in job["methods"].items():
        for zero in job["zeros"]:
            # Under ZeRO-3 with layers computed again, for which weights are gathered once more.
            policy = "full" if zero == 3 else "none"
            recipe = recipe_of(job["model"], method, zero, train__checkpointing=policy)
            train(recipe, world, Path(job["out"]) / f"zero{zero}" / name)
    close_world()


if __name__ == "__main__":
    end_as_rank(lambda: main(sys.argv[1]))
