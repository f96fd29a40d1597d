"""A benchmark in MLflow: the parent run is the benchmark, each child run one method on one dataset with one seed."""

from __future__ import annotations

from pathlib import Path

from pipeline.clip.recipe import ClipRecipe, datasets_of
from pipeline.tracking.tracker import RunFacts


def benchmark_facts(recipe: ClipRecipe) -> RunFacts:
    """The facts that the tracker records of a benchmark; `tasks` are its datasets."""
    return RunFacts(
        name=recipe.name,
        method="benchmark",
        model=recipe.model.path,
        prepared=Path(recipe.data.prepared),
        tasks=tuple(entry.name for entry, _ in datasets_of(recipe)),
        tracking=recipe.tracking,
        settings=recipe.model_dump(mode="json"),
    )
