"""A run whose recipe asks for answer heads and did not before, or the reverse: its finished stages get or lose them."""

from __future__ import annotations

import logging
from functools import partial

from pipeline.config.load import load_run
from pipeline.config.recipe import OF_HEADS
from pipeline.errors import UserError
from pipeline.files.paths import command
from pipeline.methods import Stage
from pipeline.prompts.answer_head import ANSWERS
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.stage_files import STATE, StageCheckpoint, add_stage
from pipeline.ranks.world import on_main
from pipeline.runs.attempts import open_attempt
from pipeline.runs.layout import CONFIG, REPLACING_HEADS
from pipeline.sequence.opened import OpenRun
from pipeline.sequence.stage import StageTrainer

log = logging.getLogger(__name__)


def adopt_heads(run: OpenRun, trainer: StageTrainer) -> None:
    """Give the finished stages of a run answer heads, or take theirs away, as its recipe says. A collective.

    What the stages have learned stays as it is: a head is fitted to the keys of a task's training samples, and weighed
    against the decoder on the held-out ones, with the stage's final values. A stage in training keeps its checkpoints.

    Raises UserError, before anything is written, where a stage's file has not all values that its module was trained
    as, and where a further attempt at the last stage is not finished. Raises Interrupted between two stages; the next
    call begins anew.
    """
    world, asked = run.session.world, run.method.options.keeps_answer_heads
    if not on_main(world, lambda: _differs(run, asked)):
        return
    pool, changed = PromptPool(), 0
    for index, stage in enumerate(run.stages):
        run.session.stop_if_told("while answer heads were changed")
        found = run.files.restore(index, stage)
        if found is None:
            break
        head = trainer.head_of(index, stage, pool, found.tensors) if asked else {}
        others = {name: value for name, value in found.tensors.items() if not name.startswith(STATE + ANSWERS)}
        made = StageCheckpoint({**others, **{STATE + name: value for name, value in head.items()}}, found.meta)
        if head or len(others) < len(found.tensors):
            changed += 1
            on_main(world, partial(_rewrite, run, index, stage, made))
        add_stage(pool, stage.name, made.tensors)

    def end() -> None:
        path = run.session.path
        load_run(path).adopting(run.recipe.method, OF_HEADS).dump_yaml(path / CONFIG)
        (path / REPLACING_HEADS).unlink(missing_ok=True)

    on_main(world, end)
    if changed:
        log.warning(
            "Finished stages whose answer head was %s: %d. What they learned is unchanged, and test questions are "
            "answered anew.",
            *("made" if asked else "taken away", changed),
        )


def _rewrite(run: OpenRun, index: int, stage: Stage, made: StageCheckpoint) -> None:
    (run.session.path / REPLACING_HEADS).touch()
    run.results.outdate()
    run.files.rewrite(index, stage, made)


def _differs(run: OpenRun, asked: bool) -> bool:
    """Whether heads are to be made or taken away, or a process was killed while it did so; for rank 0."""
    path = run.session.path
    recorded = load_run(path).method.keeps_answer_heads
    if recorded is asked and not (path / REPLACING_HEADS).exists():
        return False
    if open_attempt(path) is not None:
        raise UserError(
            f"method.answer_head: a further attempt at {run.stages[-1].name} is not finished. End it by "
            f"`{command('run', path / CONFIG)}`, or drop it by `{command('undo', path)}`, and change this afterwards."
        )
    return True
