"""A run whose recipe recognises tasks otherwise than before: what its finished stages keep for routing is made anew."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.config.load import load_run
from pipeline.config.method import choice_name
from pipeline.config.recipe import OF_ROUTING
from pipeline.data.stage_data import StageData
from pipeline.errors import UserError
from pipeline.methods import Stage, make_method
from pipeline.prompts.heads import prototype_of
from pipeline.prompts.routing import Routing
from pipeline.prompts.stage_files import (
    HEAD,
    StageCheckpoint,
    head_of_stage,
    is_state,
    stage_tensors,
)
from pipeline.runs.layout import CONFIG, REPLACING_HEADS, REPLACING_ROUTING, unfinished_folder
from pipeline.sequence.opened import OpenRun

log = logging.getLogger(__name__)


def adopt_routing(run: OpenRun) -> None:
    """Give the finished stages of a run the states that its recipe's routing needs, from their training samples' keys.

    What the stages have learned stays as it is, and which earlier modules they were trained behind too. For rank 0.

    Raises UserError where the new router is learned with each task, and a finished stage was trained without.
    """
    path, routing = run.session.path, run.method.routing
    recorded = load_run(path)
    before, begun = make_method(recorded.method).routing, path / REPLACING_ROUTING
    if begun.exists() or (path / REPLACING_HEADS).exists():
        run.files.finish_rewrites(run.stages)
    now = recorded.adopting(run.recipe.method, OF_ROUTING)
    if _label(before) == _label(routing) and before.keeps_keys == routing.keeps_keys and not begun.exists():
        if before.unfamiliar != routing.unfamiliar:
            run.results.outdate()
            now.dump_yaml(path / CONFIG)
        return
    finished = [(index, stage, run.files.load(index, stage)) for index, stage in enumerate(run.stages)]
    known = [(index, stage, found) for index, stage, found in finished if found is not None]
    # All states first: where one cannot be made, nothing is written.
    states = [_new_state(run, routing, stage, found) for _, stage, found in known]
    begun.touch()
    if known:
        run.results.outdate()
    changed = 0
    for (index, stage, found), state in zip(known, states, strict=True):
        learned = {name: value for name, value in found.tensors.items() if not is_state(name)}
        tensors = stage_tensors(learned, {**state, **head_of_stage(found.tensors)})
        if not _equal(tensors, found.tensors):
            run.files.rewrite(index, stage, StageCheckpoint(tensors, found.meta))
            changed += 1
    if _label(before) != _label(routing) and len(known) < len(run.stages):
        # The stage in progress has other earlier modules beside it now, and with a learned router other trainables.
        shutil.rmtree(unfinished_folder(path, len(known), run.stages[len(known)].name), ignore_errors=True)
    now.dump_yaml(path / CONFIG)
    begun.unlink()
    if changed:
        log.warning(
            "The run now recognises tasks by %s; what %d finished stages keep for it was made anew from the keys of "
            "their training samples. What they learned is unchanged, and test questions are routed anew.",
            *(choice_name(run.method.router or "none"), changed),
        )


def _new_state(run: OpenRun, routing: Routing, stage: Stage, found: StageCheckpoint) -> Mapping[str, Tensor]:
    keys = StageData([run.data.train[task] for task in stage.tasks]).keys
    if not _learned(routing):
        return routing.observe(keys, task=f"the task {stage.name}")
    if not any(name.startswith(HEAD) for name in found.tensors):
        raise UserError(
            f"The router {choice_name(run.method.router or 'none')} is learned with each task, and stage {stage.name} "
            f"of {run.session.path} was trained without. Expected the router that the run was begun with, or a new "
            "run (`--set run_dir=...`)."
        )
    return routing.observe(keys, {"prototype": prototype_of(found.tensors)}, f"the task {stage.name}")


def _label(routing: Routing) -> str | None:
    return None if routing.router is None else routing.router.label


def _learned(routing: Routing) -> bool:
    return routing.router is not None and routing.router.learned


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
