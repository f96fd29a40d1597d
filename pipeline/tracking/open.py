"""Makes the tracker of a run: on rank 0 one for MLflow if the recipe enables tracking, else one that does nothing."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.recipe import Recipe
from pipeline.tracking.mlflow_tracker import MlflowTracker
from pipeline.tracking.tracker import NullTracker, RunFacts, Tracker


def make_tracker(facts: RunFacts, run_path: Path, rank: int) -> Tracker:
    """Return an MlflowTracker on rank 0 when tracking is enabled, otherwise a NullTracker.

    Raises UserError when the tracking store cannot be reached.
    """
    return MlflowTracker(facts, run_path) if rank == 0 and facts.tracking.enabled else NullTracker()


def sequence_facts(recipe: Recipe) -> RunFacts:
    """The RunFacts of a task sequence."""
    return RunFacts(
        name=recipe.name,
        method=recipe.method.name,
        model=recipe.model.path,
        prepared=Path(recipe.data.prepared),
        tasks=tuple(task.name for task in recipe.data.tasks),
        tracking=recipe.tracking,
        settings=recipe.model_dump(mode="json"),
    )
