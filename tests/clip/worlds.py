"""Trains several recipes in one launch and writes what each learned: `python -m tests.clip.worlds JOB.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipeline.clip.recipe import ClipRecipe
from pipeline.clip.runner import run_benchmark
from pipeline.distributed import init_world


def main(job: Path) -> None:
    """Run each recipe of the job; their run folders hold the results."""
    world = init_world()
    for fields in json.loads(job.read_text())["recipes"]:
        recipe = ClipRecipe.model_validate(fields)
        result = run_benchmark(recipe)
        if world.main:
            assert result["units"], recipe.name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
