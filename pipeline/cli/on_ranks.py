"""Runs a verb's work on the ranks of this launch, or on ranks started for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pipeline.cli.outcome import Result, finish, show
from pipeline.errors import require_extras
from pipeline.ranks import launch
from pipeline.ranks.devices import require_usable_gpus
from pipeline.ranks.environment import is_distributed, rank
from pipeline.ranks.outcome import OUTCOMES

Then = Callable[[Result], Result]


def prints_text(as_json: bool) -> bool:
    """Whether this process prints text for the user: it is rank 0, has no launcher to report to, and --json is off."""
    return not as_json and OUTCOMES not in os.environ and rank() == 0


def on_ranks(
    arguments: list[str], recipe: Any, work: Callable[[Any], Result], as_json: bool, then: Then | None = None
) -> None:
    """Do `work` in this process if it is a rank or the only one, otherwise on ranks started for it.

    Args:
        arguments: the command line that the started ranks get.
        recipe: the recipe that `work` is called with.
        work: returns the result.
        as_json: show the result as JSON.
        then: changes the result before it is shown.
    """
    if is_distributed():
        result = work(recipe)
    else:
        require_extras("train", *recipe.tracking.extras)
        require_usable_gpus()  # raises once, before ranks are started
        processes = launch.local_processes(recipe.train.processes)
        if processes > 1:
            outcome = launch.launch(arguments, processes)
            if outcome.code:
                finish(outcome, as_json)
            result = outcome.result or {}
        else:
            result = work(recipe)
    if then is not None and rank() == 0:
        result = then(result)
    show(result, as_json)
