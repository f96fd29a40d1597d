"""Runs a task sequence: each stage's training and the evaluation after it; a restart resumes at the saved step."""

from __future__ import annotations

import logging
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from pipeline.config.load import as_recorded, load_run
from pipeline.config.recipe import Recipe
from pipeline.errors import require_extras
from pipeline.planning.budget import within_budget
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.stage_files import add_stage
from pipeline.ranks.world import on_main, together
from pipeline.runs.session import session
from pipeline.sequence.adopt_heads import adopt_heads
from pipeline.sequence.adopt_routing import adopt_routing
from pipeline.sequence.evaluation import Evaluator
from pipeline.sequence.learned import measure_learned
from pipeline.sequence.matrix import AccuracyMatrix
from pipeline.sequence.opened import open_run
from pipeline.sequence.record import RunRecord
from pipeline.sequence.stage import StageTrainer
from pipeline.tracking.open import make_tracker, sequence_facts
from pipeline.training.deepspeed_config import accumulation

log = logging.getLogger(__name__)


def run_sequence(recipe: Recipe, stages: str | None = None, until: int | None = None) -> dict[str, Any]:
    """Train and evaluate all unfinished stages; returns the content of matrix.json and the run's folder.

    Args:
        recipe: the run's recipe; the state of its run folder determines whether the run starts or resumes.
        stages: "train" leaves out the evaluation, "evaluate" the training; None does both.
        until: number of the last stage; None: all stages.

    Raises:
        UserError: wrong input.
        DivergedError: a loss is not a finite number.
        Interrupted: a signal asked to stop.
    """
    require_extras("train", *recipe.tracking.extras)  # otherwise an import would fail in the middle of the run
    recipe = within_budget(recipe)
    train, evaluate = stages != "evaluate", stages != "train"
    with session(recipe, recipe.train.watchdog_s, lambda world: accumulation(recipe.train, world.size)) as here:
        recipe = on_main(here.world, lambda: as_recorded(recipe, here.path))
        run = open_run(recipe, here, evaluate, train)
        on_main(here.world, lambda: adopt_routing(run))
        todo = list(enumerate(run.stages[:until]))
        # Verify every finished stage before anything is written.
        finished = on_main(here.world, lambda: [run.files.load(*place) is not None for place in todo])
        rows = len(todo) if train else sum(1 for _ in takewhile(bool, finished))  # of the matrix that this call makes
        tracker = together(lambda: make_tracker(sequence_facts(recipe), here.path, here.world.rank))
        if recipe.train.projector == "trained":
            log.warning(
                "train.projector is 'trained': every stage changes the model for all tasks, so earlier answers may "
                "change although earlier prompt sets do not."
            )
        pool, matrix = PromptPool(), AccuracyMatrix([task.name for task in recipe.data.tasks])
        trainer = StageTrainer(recipe, here, run.models.engine, run.data.train, run.files, tracker, run.data.validation)
        adopt_heads(run, trainer)
        evaluator = Evaluator(recipe, here, run.data.tests, run.models, run.made_by, tracker)
        record = RunRecord(run, pool, evaluator, tracker)
        result: dict[str, Any] = {}
        further: dict[str, Any] = {}
        with here.running(tracker.sequence(run.results.state, run.results.stay_finished), record.write_state):
            if train and evaluate and not all(finished):
                run.models.prepare_to_train()
            if evaluate:
                matrix.zero_shot = evaluator.zero_shot()
            for index, stage in todo:
                here.stop_if_told("between two stages")
                checkpoint = run.files.restore(index, stage)
                if checkpoint is not None:
                    log.info("stage %d/%d %s: finished earlier", index + 1, len(run.stages), stage.name)
                elif train:
                    new = trainer.train(index, stage, pool, partial(record.begins, index, stage))
                    record.trained(stage, new.seconds)
                    checkpoint = new.checkpoint
                else:
                    break
                add_stage(pool, stage.name, checkpoint.tensors)
                record.finished(checkpoint.meta)
                record.write_state("running")
                if evaluate:
                    seen = max(stage.tasks) + 1
                    row = evaluator.row(seen, stage.name, pool)
                    matrix.add(row, seen)
                    told = evaluator.told(seen, pool, row, recipe.evaluate.tells(last=index + 1 == rows))
                    if told is not None:
                        matrix.told[seen - 1] = told
                    if seen < len(matrix.tasks):
                        matrix.ahead[seen] = evaluator.ahead(seen, pool)
                    if recipe.evaluate.held_out and index + 1 == len(run.stages):
                        learned = measure_learned(run.data, seen - 1, pool, evaluator)
                        further = {"learned": learned.to_json() if learned is not None else None}
                    if index + 1 < len(todo):
                        record.write_matrix(matrix, last=False)
            if evaluate:
                result = record.write_matrix(matrix, last=True)
            record.write_end(evaluate)
            if evaluate:
                record.report()
        return {"run": str(here.path), "method": run.method.name, "stages": len(pool), **result, **further}


def evaluate_run(run: Path) -> dict[str, Any]:
    """Compute the missing rows of a run's accuracy matrix from its finished stages."""
    recipe = load_run(run)
    return run_sequence(recipe.model_copy(update={"run_dir": str(run)}), stages="evaluate")
