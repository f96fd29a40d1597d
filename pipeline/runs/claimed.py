"""The run folder of a recipe, held by all ranks together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.base import FileRecipe
from pipeline.ranks.shutdown import StopFlag
from pipeline.ranks.world import World, on_main
from pipeline.runs.claim import claim_run, unbegun
from pipeline.runs.layout import CONFIG
from pipeline.runs.lock import locked


@contextlib.contextmanager
def claimed(recipe: FileRecipe, world: World, stop: StopFlag | None = None) -> Iterator[Path]:
    """Yield the run folder of a recipe (see `claim_run`) and hold its lock while the block runs.

    Raises the errors of `locked` and `claim_run` on all ranks.
    """
    with contextlib.ExitStack() as held:

        def claim() -> Path:
            run = claim_run(recipe)
            held.enter_context(locked(run, stop))
            claim_run(recipe)  # again, because another process may have written to the folder before the lock was taken
            if unbegun(run):
                recipe.dump_yaml(run / CONFIG)
            return run

        yield on_main(world, claim)
