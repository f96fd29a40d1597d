"""Makes the tracker of a run: on rank 0 those that the recipe enables, elsewhere one that does nothing."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.recipe import Recipe
from pipeline.tracking.mlflow_tracker import MlflowTracker
from pipeline.tracking.several import SeveralTrackers
from pipeline.tracking.tensorboard_tracker import TensorboardTracker
from pipeline.tracking.tracker import NullTracker, RunFacts, Tracker
from pipeline.tracking.wandb_tracker import WandbTracker


def make_tracker(facts: RunFacts, run_path: Path, rank: int) -> Tracker:
    """Return on rank 0 the tracker that the recipe enables, or all of them in one; elsewhere a NullTracker.

    Raises UserError when the tracking store cannot be reached.
    """
    if rank != 0:
        return NullTracker()
    enabled = facts.tracking
    trackers: list[Tracker] = [MlflowTracker(facts, run_path)] if enabled.enabled else []
    trackers += [TensorboardTracker(facts, run_path)] if enabled.tensorboard else []
    trackers += [WandbTracker(facts, run_path)] if enabled.wandb else []
    return trackers[0] if len(trackers) == 1 else SeveralTrackers(trackers)


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
