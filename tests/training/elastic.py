"""Trains a sequence whole and stopped half-way on the ranks it is started on, then goes on with what others left."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from pipeline.config.recipe import Recipe
from pipeline.errors import Interrupted
from pipeline.prompts.model import LearnerOnLMM
from pipeline.ranks.launch import end_as_rank
from pipeline.ranks.world import World, barrier, init_world, on_main
from pipeline.sequence.run import run_sequence
from tests.e2e.conftest import recipe_on
from tests.stopping import signal_in_forward

STEPS, TASKS = 6, 2
CHANGES: dict[str, Any] = {
    "train__steps": STEPS,
    "train__save_minutes": None,
    "train__lr_prompt": 1e-2,
    "train__deepspeed": "ds_configs/zero3.json",
    "train__schedule": "cosine",
}


def stop_half_way(recipe: Recipe, world: World) -> None:
    """Stop in the middle of the second stage: told on the last rank alone, which all have to hear of."""
    last = world.rank == world.size - 1
    told = signal_in_forward(LearnerOnLMM, STEPS + STEPS // 2) if last else contextlib.nullcontext()
    with told, contextlib.suppress(Interrupted):
        run_sequence(recipe, stages="train")
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


def main(prepared: Path, out: Path, global_batch: int = 4) -> None:
    """Leave `<ranks>-whole.json`, and `<saved on>-to-<ranks>.json` for every stopped run that is there."""
    world = init_world()
    changes = {**CHANGES, "train__global_batch": global_batch}

    def train(name: str) -> None:
        recipe = recipe_on(prepared, out / name, TASKS, **changes)
        run_sequence(recipe, stages="train")
        if world.main:
            result(recipe, out / f"{name}.json")

    if on_main(world, lambda: not (out / f"{world.size}-half").exists()):
        train(f"{world.size}-whole")
        stop_half_way(recipe_on(prepared, out / f"{world.size}-half", TASKS, **changes), world)
        barrier()
    for source in on_main(world, lambda: sorted(out.glob("?-half"))):
        name = f"{source.name[0]}-to-{world.size}"
        if on_main(world, lambda: not (out / name).exists()):  # noqa: B023 - called at once
            on_main(world, lambda: shutil.copytree(source, out / name))  # noqa: B023
            train(name)


if __name__ == "__main__":
    end_as_rank(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])))
