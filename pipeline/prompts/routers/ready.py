"""Whether states have what a router needs: completed from their kept keys, or another router in its place."""

from __future__ import annotations

import logging

from pipeline.errors import UserError
from pipeline.prompts.routers.base import Router, State, States
from pipeline.prompts.routers.kept_keys import HAS_IMAGE, keeps, keys_of
from pipeline.prompts.routers.mean import KeyWeights, Mean

log = logging.getLogger(__name__)


def ready_states(router: Router, states: States) -> tuple[Router, States]:
    """The router that can score with these states, and the states with all that it needs.

    What a router keeps of a task in closed form is made of the task's kept keys where the state was learned with
    another router. Where a task keeps fewer keys than the router needs, `mean` takes its place for all tasks, with a
    warning.

    Raises UserError where states lack what cannot be made from kept keys.
    """
    if router.needs_keys and all(keeps(state) for state in states):
        counts = [len(state[HAS_IMAGE]) for state in states]
        if min(counts) < router.fewest:
            short = sum(count < router.fewest for count in counts)
            log.warning(
                "%d of %d tasks have fewer than the %d samples that the router %s needs (the fewest: %d); samples are "
                "routed by the means of the tasks' keys instead.",
                *(short, len(counts), router.fewest, router.word, min(counts)),
            )
            weight = getattr(router.options, "image_weight", 0.5)
            router = Mean(KeyWeights(image_weight=weight))
    lacking = [state for state in states if not _has_all(router, state)]
    if not lacking:
        return router, states
    if router.learned or not all(keeps(state) for state in lacking):
        what = "a vector that is learned with each task" if router.learned else "routing keys that each task keeps"
        raise UserError(
            f"{len(lacking)} of {len(states)} tasks were learned with another router than {router.word}, which needs "
            f"{what}. Expected the router of then, or a new run (`--set run_dir=...`)."
        )
    completed = [state if _has_all(router, state) else {**state, **router.observe(keys_of(state))} for state in states]
    return router, States(completed)


def _has_all(router: Router, state: State) -> bool:
    return all(name in state for name in router.names) and (not router.needs_keys or keeps(state))
