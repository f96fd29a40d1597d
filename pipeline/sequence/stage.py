"""Trains one stage, from its initial or resumed values to its finished folder."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pipeline.backbones.packing import Fill
from pipeline.config.recipe import Recipe
from pipeline.console.progress import Progress
from pipeline.data.collate import Examples, MicroBatches
from pipeline.data.kept_features import KeptFeatures
from pipeline.data.selection import Selection
from pipeline.data.stage_data import StageData
from pipeline.errors import UserError
from pipeline.methods import Stage, make_method
from pipeline.planning.out_of_memory import out_of_memory_advice
from pipeline.prompts.parts.base import shape_of
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routers import State
from pipeline.prompts.stage_files import StageCheckpoint, stage_tensors
from pipeline.prompts.terms import FinishedStage
from pipeline.ranks.world import on_main
from pipeline.runs.provenance import package_versions
from pipeline.runs.session import Session
from pipeline.sequence.answer_head import answer_head
from pipeline.sequence.data import Part, stage_order
from pipeline.sequence.gradients import mean_squares
from pipeline.sequence.keep_features import keep_features
from pipeline.sequence.stage_files import StageFiles
from pipeline.tracking.step_numbers import StepNumbers, set_shares
from pipeline.tracking.tracker import NullTracker, Tracker
from pipeline.training.engine import Engine
from pipeline.training.loop import Attempt, train_stage
from pipeline.training.operations import OperationCount
from pipeline.training.resume import StepSaver, restore_random_state
from pipeline.training.schedule import LearningRate, schedule, total_steps

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedStage:
    """A trained stage: its checkpoint in the run folder, the logged steps, and the time it took."""

    checkpoint: StageCheckpoint
    history: list[Progress]
    seconds: float  # including earlier attempts


class StageTrainer:
    """Trains the stages of a run with one engine.

    Args:
        recipe: the run's recipe (sections method, train and data).
        session: the ranks, the graceful shutdown and the watchdog.
        engine: makes the training engine; called when the first stage needs it.
        parts: the training samples of every task, in the order of the recipe's tasks.
        files: reads and writes the stages' folders.
        tracker: receives the metrics of every stage.
        held_out: the tasks' samples that no stage trains on, which answer heads are weighed with; they may be empty.
    """

    def __init__(
        self,
        recipe: Recipe,
        session: Session,
        engine: Callable[[], Engine],
        parts: Sequence[Part],
        files: StageFiles,
        tracker: Tracker | None = None,
        held_out: Sequence[Part] = (),
    ) -> None:
        self.recipe, self.session, self.engine, self.parts, self.files = recipe, session, engine, parts, files
        self.held_out = held_out
        self.tracker = tracker or NullTracker()
        self.method = make_method(recipe.method)

    def train(
        self, index: int, stage: Stage, pool: PromptPool, begins: Callable[[], object] = lambda: None
    ) -> TrainedStage:
        """Train a stage from its newest checkpoint or its initial values, and save it.

        Args:
            index: the stage's number, 0-based.
            stage: the stage.
            pool: the prompt sets of the finished stages; it is not changed.
            begins: called on every rank before the first step, within the stage's run in the tracker.

        Raises:
            DivergedError: a loss is not a finite number.
            Interrupted: a signal asked to stop.
        """
        engine, world, watchdog = self.engine(), self.session.world, self.session.watchdog
        watchdog.beat(f"beginning stage {stage.name}", slow=True)
        began = time.perf_counter()
        batches = self._batches(engine, index, stage, pool)
        self._start(engine, index, pool, uses_pool=batches.selection.width > 0)
        begun = {"task": stage.name, "steps": batches.steps, "earlier_sets": pool.whole_fingerprint(heads=False)}
        begun |= self.files.attempt_facts(index)
        found = on_main(world, lambda: self.files.begin(index, stage, begun))
        start, seconds_before = 0, 0.0
        if found is not None:
            start, seconds_before = found.step, found.meta.get("seconds", 0.0)
            engine.resume(found.values, start, found.moments)
            restore_random_state(found.random, world.rank, world.device)
        log.info(
            "stage %d/%d %s: %d samples, %d steps%s",
            index + 1,
            len(self.method.stages([task.name for task in self.recipe.data.tasks])),
            stage.name,
            len(batches.examples.data),
            batches.steps,
            f", resuming after step {start}" if start else "",
        )
        folder = self.files.unfinished(index, stage)
        begun |= {**self.files.expected(stage), "world_size": world.size, "seconds": seconds_before}
        config = self.recipe.train
        saver = StepSaver(engine, world, folder, config, begun)
        count = engine.count = OperationCount()
        with self.tracker.stage(index, stage.name):
            begins()
            self.tracker.metrics(set_shares(batches.selection, pool.names), 0)
            numbers = StepNumbers(batches, pool.names, start)
            with out_of_memory_advice(config, self.recipe.model.quantization != "none"):
                history = train_stage(
                    engine,
                    batches,
                    config,
                    LearningRate(config.lr_prompt, lambda step: schedule(config, step, batches.steps)),
                    self.session,
                    Attempt(folder, saver, start),
                    lambda progress: self.tracker.metrics(numbers(progress), progress.step),
                )
            watchdog.beat(f"saving stage {stage.name}", slow=True)
            if engine.module.packing:
                log.info("stage %s, packed on this rank: %s", stage.name, engine.module.fill)
                engine.module.fill = Fill()
            final = history[-1]
            seconds = round(time.perf_counter() - began + seconds_before, 1)
            facts = {
                "method": self.method.name,
                "seed": self.recipe.seed,
                "steps": batches.steps,
                "world_size": world.size,
                "seconds": seconds,
                "loss": final.loss,
                "trained_parameters": sum(math.prod(shape_of(value)) for value in engine.trainables.values()),
                "operations_per_sample": count.per_sample,
                "versions": package_versions(),
                **self.files.attempt_facts(index),
            }
            values = engine.values()
            state = self._state(engine, batches.examples.data, values, stage.name)
            if self.method.options.keeps_answer_heads:
                held_out = self._held_out(index, stage, pool)
                head = answer_head(engine, batches.examples, *held_out, self.session, stage.name)
                state = {**state, **head}
            left = self._left(engine, batches, values, pool)
            saved = self.files.save(index, stage, stage_tensors(left, state), facts)
            self.tracker.stage_model(saved, stage.name, {"loss": final.loss, "loss_lm": final.terms["loss_lm"]})
            self.tracker.artifact(saved / "meta.json")
        checkpoint = self.files.restore(index, stage)
        if checkpoint is None:
            raise RuntimeError(f"the checkpoint of stage {stage.name} is not there after it was saved")
        return TrainedStage(checkpoint, history, seconds)

    def head_of(self, index: int, stage: Stage, pool: PromptPool, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The answer head of a finished stage with these tensors; `pool` has the earlier stages. A collective.

        Raises UserError where the tensors lack a value that the stage's module was trained as.
        """
        engine = self.engine()
        missing = [name for name in engine.trainables if name not in tensors]
        if missing:
            raise UserError(
                f"method.answer_head: the file of stage {stage.name} has other values than those that "
                f"{self.method.title} trained ({missing[0]} is missing), so no answer head can be made for it; "
                "expected none, or a new run (`--set run_dir=...`) that has heads from the first task on."
            )
        # Neither selections nor features of the training samples, of which the head reads answers and keys.
        examples = self._examples(engine, StageData([self.parts[task] for task in stage.tasks]))
        held_out, selection = self._held_out(index, stage, pool)
        self._start(engine, index, pool, uses_pool=selection.width > 0)
        engine.restart({name: tensors[name] for name in engine.trainables})
        return answer_head(engine, examples, held_out, selection, self.session, stage.name)

    def _batches(self, engine: Engine, index: int, stage: Stage, pool: PromptPool) -> MicroBatches:
        """The micro-batches of this rank: the stage's samples in order, each with its selection of earlier sets."""
        recipe, world, module = self.recipe, self.session.world, engine.module
        parts = [self.parts[task] for task in stage.tasks]
        data = StageData(parts)
        by_image = self.method.insertion == "after_image"
        order = stage_order(recipe.train, recipe.seed, index, data, by_image)
        steps = total_steps(recipe.train, order.batches_per_epoch)
        routing = make_method(recipe.method.after(index + 1)).routing
        self.session.watchdog.beat(f"selecting the earlier modules of stage {stage.name}", slow=True)
        # On rank 0 for all: the others need neither kept keys nor a fit, and none can select otherwise.
        selected = on_main(world, lambda: routing.training(data.keys, pool.states))
        kept = None
        if recipe.train.vision_features == "kept":
            kept = keep_features(
                module.lmm,
                parts,
                self.files.constants["base_model"],
                world,
                self.session.watchdog,
                recipe.data.workers,
                lambda: self.session.stop_if_told("while vision features were kept"),
            )
        examples = self._examples(engine, data, kept)
        return MicroBatches(examples, order, selected, steps, engine.accumulation, world.rank, world.size)

    def _examples(self, engine: Engine, data: StageData, kept: KeptFeatures | None = None) -> Examples:
        """A stage's samples as batches are made of them."""
        sharing: Literal["image", "none"] = "image" if engine.module.in_two_passes else "none"
        return Examples(data, engine.module.lmm.conversation, sharing, kept=kept)

    def _start(self, engine: Engine, index: int, pool: PromptPool, uses_pool: bool) -> None:
        """Set the engine to the stage's initial values, identical on every rank."""
        module, learner = engine.module, engine.module.learner
        modules = pool.tensors if uses_pool or learner.uses_bank else {}
        learner.start_stage({**modules, **pool.common, **pool.memory}, pool.newest() if learner.uses_previous else None)
        engine.restart(learner.start(module.lmm, self.recipe.seed, index, pool.newest()))

    def _left(
        self, engine: Engine, batches: MicroBatches, values: Mapping[str, Tensor], pool: PromptPool
    ) -> dict[str, Tensor]:
        """What the stage's file holds: its module, what all modules share, and what terms remember; a collective."""
        learner = engine.module.learner

        def squares(samples: int) -> Mapping[str, Tensor]:
            return mean_squares(engine, batches, samples, self.session)

        stage = FinishedStage(values, pool.memory, squares)
        remembered = [term.remembered(stage) for term in learner.terms]
        left: dict[str, Tensor] = learner.outcome(values, pool.newest())
        return {**left, **{name: value for told in remembered for name, value in told.items()}}

    def _held_out(self, index: int, stage: Stage, pool: PromptPool) -> tuple[StageData | None, Selection]:
        """The samples that the stage's answer head is weighed with, each with its earlier sets; a collective."""
        parts = [self.held_out[task] for task in stage.tasks if self.held_out and len(self.held_out[task][0])]
        if not parts:
            return None, Selection.none(0)
        held_out = StageData(parts)
        routing = make_method(self.recipe.method.after(index + 1)).routing
        return held_out, on_main(self.session.world, lambda: routing.training(held_out.keys, pool.states))

    def _state(self, engine: Engine, data: StageData, values: dict[str, Tensor], task: str) -> State:
        """The router's state of the stage's task, from the trained values or from the keys of its training samples."""
        routing = self.method.routing
        learned = engine.module.learner.finish(values) if routing.router is None or routing.router.learned else None
        return routing.observe(data.keys, learned, f"the task {task}")
