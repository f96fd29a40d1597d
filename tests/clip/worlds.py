"""Trains several recipes in one launch: `python -m tests.clip.worlds JOB.json`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from pipeline.clip.benchmark.run import run_benchmark
from pipeline.clip.learning.model import PromptedCLIP
from pipeline.clip.recipe import ClipRecipe
from pipeline.errors import Interrupted
from pipeline.ranks.world import init_world
from tests.stopping import signal_in_forward


def main(job: Path) -> None:
    """Run each recipe of the job; with `stop` the last rank is told to stop in the forward pass of that number."""
    world, content = init_world(), json.loads(job.read_text())
    stop = content.get("stop")
    for fields in content["recipes"]:
        recipe = ClipRecipe.model_validate(fields)
        if stop:
            last = world.rank == world.size - 1
            told = signal_in_forward(PromptedCLIP, stop) if last else contextlib.nullcontext()
            with told, contextlib.suppress(Interrupted):
                run_benchmark(recipe)
                raise AssertionError(f"{recipe.name} was not stopped")
            continue
        result = run_benchmark(recipe)
        if world.main:
            assert result["units"], recipe.name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
