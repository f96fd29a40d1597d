"""A benchmark in MLflow: the parent run is the benchmark, each child run one method on one dataset with one seed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.clip.recipe import ClipRecipe, datasets_of
from pipeline.tracking.tracker import Tracker, make_tracker


def make_benchmark_tracker(recipe: ClipRecipe, run_path: Path, rank: int) -> Tracker:
    """The tracker of a benchmark: that of a sequence, shown the benchmark's datasets where it looks for tasks.

    Raises UserError when the tracking store cannot be reached.
    """
    seen: Any = SimpleNamespace(
        name=recipe.name,
        tracking=recipe.tracking,
        method=SimpleNamespace(name="benchmark"),
        model=recipe.model,
        data=SimpleNamespace(
            prepared=recipe.data.prepared, tasks=[SimpleNamespace(name=entry.name) for entry, _ in datasets_of(recipe)]
        ),
        model_dump=recipe.model_dump,
    )
    return make_tracker(seen, run_path, rank)
