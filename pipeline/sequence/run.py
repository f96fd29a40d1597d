"""The task sequence: which stage is next, its training, the evaluation after it, and what a restart finds."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.backbones.base_model import recorded_base_model
from pipeline.backbones.lmm import base_fingerprint
from pipeline.backbones.lmm_processor import settings_fingerprint
from pipeline.config.recipe import Recipe, as_recorded, load_run
from pipeline.console.log import log_to_terminal
from pipeline.data.collate import Examples, MicroBatches, StageData
from pipeline.data.shards import IDENTITY_FIELDS
from pipeline.errors import Interrupted
from pipeline.methods import Method, Stage, make_method
from pipeline.metrics.continual import after_stage
from pipeline.planning.frozen_models import fetch_models
from pipeline.planning.out_of_memory import told_what_helps
from pipeline.prompts.pool import PromptPool, fingerprint_of
from pipeline.ranks.shutdown import StopFlag, stop_on_signals
from pipeline.ranks.watchdog import Watchdog, collective_timeout
from pipeline.ranks.world import World, agree, barrier, init_world, on_main, together
from pipeline.runs.finished import (
    check_stage,
    load_stage,
    save_stage,
    stage_folder,
    start_stage_folder,
    unfinished_folder,
)
from pipeline.runs.lock import claimed
from pipeline.runs.provenance import package_versions
from pipeline.sequence.data import open_data, stage_order
from pipeline.sequence.engine import PROJECTOR, Engine, initial_values
from pipeline.sequence.evaluation import RunEvaluation
from pipeline.sequence.keep_features import keep_features
from pipeline.sequence.matrix import matrix, routing_accuracy
from pipeline.sequence.models import Models
from pipeline.sequence.results import RunResults
from pipeline.tracking.tracker import StepNumbers, Tracker, make_tracker, set_shares
from pipeline.training.deepspeed_config import accumulation
from pipeline.training.loop import total_steps, train_stage
from pipeline.training.resume import StepSaver, StepState, cut_log, newest, restore_random_state

log = logging.getLogger("pipeline.sequence.run")


def run_sequence(recipe: Recipe, stages: str | None = None, until: int | None = None) -> dict[str, Any]:
    """Train and evaluate all stages that are not done yet and return the content of matrix.json and the run's folder.

    `stages` "train" leaves out the evaluation, "evaluate" the training; `until` is the number of the last stage to do,
    None all. Raises UserError for wrong input, DivergedError for a loss that is not finite, Interrupted when a signal
    asked to stop.
    """
    log_to_terminal()
    with stop_on_signals() as stop:
        limit_s = recipe.train.watchdog_s
        world = init_world(collective_timeout(limit_s))
        accumulation(recipe, world.size)
        with Watchdog(world, limit_s).watching() as watchdog, claimed(recipe, world, stop) as path:
            recipe = on_main(world, lambda: as_recorded(recipe, path))
            sequence = Sequence(recipe, path, world, stop, watchdog)
            return sequence.run(stages != "evaluate", stages != "train", until)


def evaluate_run(run: Path) -> dict[str, Any]:
    """Fill in what is missing of a run's accuracy matrix from its finished stages."""
    recipe = load_run(run)
    return run_sequence(recipe.model_copy(update={"run_dir": str(run)}), stages="evaluate")


class Sequence:
    """One run in progress."""

    def __init__(self, recipe: Recipe, path: Path, world: World, stop: StopFlag, watchdog: Watchdog) -> None:
        """`path` is the run folder, claimed."""
        self.recipe, self.path, self.world, self.stop, self.watchdog = recipe, path, world, stop, watchdog
        self.method: Method = make_method(recipe.method)
        fetch_models(recipe, world, lambda: self._stop_if_told("while models are fetched"))
        self.data = open_data(recipe, world, True, lambda: self._stop_if_told("while the data was looked through"))
        self.tests = self.data.tests
        self.stages = self.method.stages([task.name for task in recipe.data.tasks])
        self.pool = PromptPool()
        self.projector: dict[str, torch.Tensor] = {}  # as the last stage in the pool left it; empty: the base model's
        self.constants = on_main(world, self._constants)
        penalty = recipe.evaluate.repetition_penalty
        # Answers depend on these, stages do not.
        files = on_main(world, lambda: settings_fingerprint(recipe.model, penalty))
        self.answering_model = {"base_model": self.constants["base_model"], "model_files": files}
        self.timing: dict[str, float] = {}
        self.began = time.perf_counter()
        self.tracker: Tracker
        self.evaluation: RunEvaluation
        self.results = RunResults(path)
        self.models = Models(recipe, world, self.data.train[0][1].image.shape[1], watchdog, self.data.telling)

    def _constants(self) -> dict[str, Any]:
        """What a stage's checkpoint must agree with for its sets to mean the same."""
        return {
            "base_model": base_fingerprint(self.recipe.model, recorded_base_model(self.path)),
            "clip": {name: self.data.identity[name] for name in IDENTITY_FIELDS},
        }

    # ------------------------------------------------------------------ the run

    def run(self, train: bool = True, evaluate: bool = True, until: int | None = None) -> dict[str, Any]:
        """All stages in order, or those up to `until`; see `run_sequence`."""
        # Everything that can be refused is looked at before anything is written.
        finished = on_main(self.world, lambda: self._finished(until))
        self.tracker = together(lambda: make_tracker(self.recipe, self.path, self.world.rank))
        if self._trains_projector:
            log.warning(
                "train.projector is 'trained': every stage changes the model for all tasks, so earlier answers may "
                "change although earlier prompt sets do not."
            )
        self.evaluation = evaluation = RunEvaluation(
            recipe=self.recipe,
            path=self.path,
            method=self.method,
            data=self.data,
            models=self.models,
            tracker=self.tracker,
            stop=self.stop,
            answering_model=self.answering_model,
        )
        try:
            with self.tracker.sequence(self.results.state, self.results.stay_finished):
                self._write_state("running")
                if train and evaluate and not all(finished):
                    self.models.prepare_to_train()
                zero_shot = evaluation.zero_shot() if evaluate else None
                accuracy: list[list[float | None]] = []
                ahead: list[float | None] = [None] * len(self.tests)  # [T] scores of tasks just before their stages
                result: dict[str, Any] = {}
                for index, stage in enumerate(self.stages[:until]):
                    self._stop_if_told("between two stages")
                    if self._restore(index, stage):
                        log.info("stage %d/%d %s: finished earlier", index + 1, len(self.stages), stage.name)
                    elif train:
                        self._train(index, stage)
                    else:
                        break
                    self._write_state("running")
                    if evaluate:
                        seen = max(stage.tasks) + 1
                        row = evaluation.after(seen, stage.name, self.pool, self.projector)
                        if seen < len(self.tests):
                            ahead[seen] = evaluation.ahead(seen, self.pool, self.projector)
                        # Joint training knows all tasks after its only stage: rows above the last have nothing to say.
                        accuracy += [[None] * len(row) for _ in range(seen - 1 - len(accuracy))]
                        accuracy.append(row)
                        if index + 1 < len(finished):
                            self._write_matrix(zero_shot, accuracy, ahead, last=False)
                if evaluate:
                    result = self._write_matrix(zero_shot, accuracy, ahead, last=True)
                self._write_state(self._status(evaluate))
                if evaluate:
                    self._report()
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                self._write_state("stopped" if isinstance(error, Interrupted) else "failed")
            if isinstance(error, Interrupted):
                barrier()  # all ranks have heard of it; the first to leave may make a launcher end the others
            raise
        return {"run": str(self.path), "method": self.method.name, "stages": len(self.pool), **result}

    def _finished(self, until: int | None) -> list[bool]:
        """Which stages are finished; raises UserError for one that is damaged or of other data or models."""
        return [self._load(index, stage) is not None for index, stage in enumerate(self.stages[:until])]

    def _load(self, index: int, stage: Stage) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]] | None:
        """Prompt set, prototype and projector of a stage; None when it still has to be trained."""
        checkpoint = load_stage(self.path, index, stage.name)
        if checkpoint is None:
            return None
        folder = stage_folder(self.path, index, stage.name)
        check_stage(folder, checkpoint.meta, {**self.constants, "data": self._fingerprints(stage)})
        return checkpoint.prompt, checkpoint.prototype, checkpoint.projector

    def _restore(self, index: int, stage: Stage) -> bool:
        """Take a finished stage from its checkpoint; False when it still has to be trained."""
        found = on_main(self.world, lambda: self._load(index, stage))
        if found is None:
            return False
        prompt, prototype, self.projector = found
        self.pool.append(stage.name, prompt, prototype)
        return True

    def _train(self, index: int, stage: Stage) -> None:
        """Train one stage, save it, and add its set to the pool."""
        recipe, engine = self.recipe, self._get_engine()
        self.watchdog.beat(f"beginning stage {stage.name}", slow=True)
        began = time.perf_counter()
        world, parts = self.world, [self.data.train[task] for task in stage.tasks]
        data = StageData(parts)
        order = stage_order(recipe, data, index)
        steps = total_steps(recipe.train, order.batches_per_epoch)
        selected = make_method(recipe.method.after(index + 1)).training_sets(self.pool, data.keys)
        sharing: Literal["image", "none"] = "image" if engine.module.in_two_passes else "none"
        kept = None
        if recipe.train.vision_features == "kept":
            base, threads = self.constants["base_model"], recipe.data.workers
            kept = keep_features(
                engine.module.lmm,
                parts,
                base,
                world,
                self.watchdog,
                threads,
                lambda: self._stop_if_told("while vision features were kept"),
            )
        examples = Examples(data, engine.module.lmm.conversation, sharing, kept=kept)
        batches = MicroBatches(examples, order, selected, steps, engine.accumulation, world.rank, world.size)
        previous = self.pool.prompts[-1] if len(self.pool) else None
        init = "previous" if self.method.carries_prompt else recipe.method.init
        values = initial_values(engine.module, init, recipe.seed, index, previous)
        values.update({f"{PROJECTOR}{name}": value for name, value in self.projector.items()})
        uses_bank = selected.shape[1] > 0
        bank = self.pool.prompts if uses_bank else torch.zeros(0, recipe.method.prompt_length, engine.module.lmm.width)
        weight = recipe.method.prototype_weight if self.method.learns_prototypes else 0.0
        engine.start_stage(values, bank, weight)
        earlier = fingerprint_of({"prompts": self.pool.prompts, "prototypes": self.pool.prototypes})
        facts = {
            **self.constants,
            "data": self._fingerprints(stage),
            "task": stage.name,
            "steps": steps,
            "earlier_sets": earlier,
            "world_size": world.size,
        }
        found = on_main(world, lambda: self._begin(index, stage, facts))
        folder, start = unfinished_folder(self.path, index, stage.name), 0
        if found is not None:
            start, facts["seconds"] = found.step, found.meta.get("seconds", 0.0)
            engine.resume_stage(found.values, start, found.moments)
            restore_random_state(found.random, world.rank, world.device)
        saver = StepSaver(engine, world, folder, recipe.train, facts)
        log.info(
            "stage %d/%d %s: %d samples, %d steps%s",
            index + 1,
            len(self.stages),
            stage.name,
            len(data),
            steps,
            f", going on after step {start}" if start else "",
        )
        with self.tracker.stage(index, stage.name):
            if world.main:
                self.results.begins(index, max(stage.tasks))
            self._write_state("running")  # with the stage's MLflow run, so that a restart continues it
            self.tracker.metrics(set_shares(selected, self.pool.names), 0)
            numbers = StepNumbers(batches, self.pool.names, start)
            with told_what_helps(recipe, "training"):
                history = train_stage(
                    engine,
                    batches,
                    recipe.train,
                    world,
                    folder,
                    self.stop,
                    lambda p: self.tracker.metrics(numbers(p), p.step),
                    None,
                    saver,
                    self.watchdog,
                    start,
                )
            self.watchdog.beat(f"saving stage {stage.name}", slow=True)
            values = engine.values()
            seconds = round(time.perf_counter() - began + facts.get("seconds", 0.0), 1)
            meta = {
                **self.constants,
                "data": self._fingerprints(stage),
                "method": self.method.name,
                "seed": recipe.seed,
                "steps": steps,
                "world_size": world.size,
                "seconds": seconds,
                "loss": history[-1].loss,
                "versions": package_versions(),
            }
            saved = on_main(world, lambda: save_stage(self.path, index, stage.name, values, meta))
            final = history[-1]
            self.tracker.stage_model(saved, stage.name, {"loss": final.loss, "loss_lm": final.terms["loss_lm"]})
            self.tracker.artifact(saved / "meta.json")
        self.timing[f"train.{stage.name}_s"] = seconds
        if not self._restore(index, stage):
            raise RuntimeError(f"the checkpoint of stage {stage.name} is not there after it was saved")
        self.results.trained()

    def _begin(self, index: int, stage: Stage, facts: dict[str, Any]) -> StepState | None:
        """The newest checkpoint of a stage that an earlier attempt did not finish; without one, clear away what that
        left: its folder, and evaluations with sets that will be replaced."""
        folder = unfinished_folder(self.path, index, stage.name)
        found = newest(folder)
        if found is not None:
            check_stage(folder, found.meta, {**self.constants, "data": self._fingerprints(stage)})
            if all(found.meta.get(name) == facts[name] for name in ("earlier_sets", "steps")):
                cut_log(folder / "metrics.jsonl", found.step)
                return found
            log.warning("%s was begun after other earlier stages than there are now; it begins anew.", folder)
        for number in range(max(stage.tasks) + 1, len(self.tests) + 1):
            for name in (f"after-{number:02d}", f"ahead-{number + 1:02d}"):
                shutil.rmtree(self.path / "eval" / name, ignore_errors=True)
        start_stage_folder(self.path, index, stage.name)
        return None

    def _stop_if_told(self, place: str) -> None:
        self.watchdog.beat(place, slow=True)
        if agree(self.stop.requested, self.world.device):
            raise Interrupted(f"Stopped by a signal {place}. Run the same command again to go on.")

    def _get_engine(self) -> Engine:
        return self.models.engine()

    def _fingerprints(self, stage: Stage) -> dict[str, str]:
        return {self.recipe.data.tasks[task].name: self.data.train[task][0].fingerprint for task in stage.tasks}

    # ------------------------------------------------------------------ results

    def _write_matrix(
        self,
        zero_shot: list[float] | None,
        accuracy: list[list[float | None]],
        ahead: list[float | None],
        last: bool,
    ) -> dict[str, Any]:
        routing = None
        if last and accuracy and len(self.pool) == len(self.tests) and self.method.learns_prototypes:
            routing = routing_accuracy(self.tests, self.pool, self.recipe.method.image_weight)
        given = ahead if self.recipe.evaluate.ahead else None
        # Not before the first stage: it reads the texts of all tasks.
        majority = self.evaluation.majority()
        content = matrix([test.name for test in self.tests], zero_shot, accuracy, routing, given, majority)
        on_main(self.world, lambda: self.results.write_matrix(content, last))
        numbers: dict[str, float | None] = dict(after_stage(accuracy, len(accuracy) - 1)) if accuracy else {}
        for name, row in (routing or {}).items():
            numbers[f"routing.{name}"] = sum(row) / len(row)
        self.tracker.metrics(numbers, len(accuracy))
        return content

    def _report(self) -> None:
        """Write the report; a run is worth keeping even if its page cannot be drawn."""
        if not self.world.main:
            return
        from pipeline.report.page import write_report

        try:
            write_report(self.path, [])
        except Exception as error:
            log.warning("The report of %s could not be drawn (%s); the run itself is whole.", self.path, error)
            return
        self.tracker.results(self.path, complete=len(self.pool) == len(self.stages))

    @property
    def _trains_projector(self) -> bool:
        return self.recipe.train.projector == "trained"

    # ------------------------------------------------------------------ state

    def _status(self, evaluated: bool) -> str:
        """What run.json says at the end of a call: done, trained (the matrix is to come) or stopped (stages are)."""
        if len(self.pool) < len(self.stages):
            return "stopped"
        return "done" if evaluated else "trained"

    def _write_state(self, status: str) -> None:
        if not self.world.main:
            return
        previous = self.results.state
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if self.evaluation.seconds:
            self.timing["evaluate_s"] = round(self.evaluation.seconds, 1)
        if status != "running":
            self.timing["total_s"] = round(time.perf_counter() - self.began, 1)
        self.results.write_state(
            status,
            {
                "recipe": self.recipe.name,
                "method": self.method.name,
                "status": status,
                "seed": self.recipe.seed,
                "stage": len(self.pool),
                "stages": [stage.name for stage in self.stages],
                "started": previous.get("started", now),
                "updated": now,
                "world_size": self.world.size,
                "mlflow": self.tracker.run_ids(),
                "versions": package_versions(),
                "timing": self.results.times(self.timing),
                "skipped": self.data.skipped,
                "data": self.data.record,
                "left_out": self.data.left_out,
            },
        )
        previous.setdefault("started", now)
