"""Trains a sequence whole and stopped half-way on the ranks it is started on, then goes on with what others left."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from pipeline.config import Recipe
from pipeline.distributed import barrier, init_world
from pipeline.errors import Interrupted
from pipeline.launch import end_as_rank
from pipeline.sequence import run_sequence
from pipeline.stopping import StopFlag
from tests.e2e.conftest import recipe_on

STEPS, TASKS = 6, 2
CHANGES: dict[str, Any] = {
    "train__steps": STEPS,
    "train__save_minutes": None,
    "train__lr_prompt": 1e-2,
    "train__deepspeed": "ds_configs/zero3.json",
    "train__schedule": "cosine",
}


def stop_half_way(recipe: Recipe) -> None:
    """Stop in the middle of the second stage: told on the last rank alone, which all have to hear of."""
    import pipeline.train

    world, seen = init_world(), []
    schedule = pipeline.train.schedule

    def counted(config: Any, step: int, total: int) -> float:
        seen.append(step)
        if len(seen) == STEPS + STEPS // 2 and world.rank == world.size - 1:
            flags[-1].requested = True
        return schedule(config, step, total)

    flags: list[StopFlag] = []
    begin = StopFlag.__init__

    def remember(self: StopFlag, requested: bool = False) -> None:
        begin(self, requested)
        flags.append(self)

    pipeline.train.schedule, StopFlag.__init__ = counted, remember  # type: ignore[method-assign]
    try:
        run_sequence(recipe, stages="train")
    except Interrupted:
        return
    finally:
        pipeline.train.schedule, StopFlag.__init__ = schedule, begin  # type: ignore[method-assign]
    raise AssertionError("the run was not stopped")


def result(recipe: Recipe, path: Path) -> None:
    """Final values of both stages and the losses of the second, as JSON."""
    numbers: dict[str, list[float]] = {}
    for number in range(TASKS):
        folder = recipe.run_path / "stages" / f"{number + 1:02d}-T{number}"
        for name, value in load_file(folder / "prompts.safetensors").items():
            numbers[f"{number}.{name}"] = value.flatten().tolist()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers["loss"] = [line["loss"] for line in lines]
    path.write_text(json.dumps(numbers))


def main(prepared: Path, out: Path) -> None:
    """Leave `<ranks>-whole.json`, and `<saved on>-to-<ranks>.json` for every stopped run that is there."""
    world = init_world()
    whole = recipe_on(prepared, out / f"{world.size}-whole", TASKS, **CHANGES)
    run_sequence(whole, stages="train")
    half = recipe_on(prepared, out / f"{world.size}-half", TASKS, **CHANGES)
    stop_half_way(half)
    barrier()
    todo = [("whole", whole)]
    for source in sorted(path for path in out.glob("?-half")):
        name = f"{source.name[0]}-to-{world.size}"
        if world.main:
            shutil.copytree(source, out / name)
        barrier()
        recipe = recipe_on(prepared, out / name, TASKS, **CHANGES)
        run_sequence(recipe, stages="train")
        todo.append((name, recipe))
    for name, recipe in todo if world.main else []:
        result(recipe, out / f"{name if '-to-' in name else f'{world.size}-{name}'}.json")


if __name__ == "__main__":
    end_as_rank(lambda: main(Path(sys.argv[1]), Path(sys.argv[2])))
