"""A run with its models and data opened and verified, before anything is trained or written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.backbones.base_model import base_fingerprint
from pipeline.backbones.lmm_processor import settings_fingerprint
from pipeline.backbones.quantised import require_quantiser
from pipeline.config.recipe import Recipe
from pipeline.data.shards import IDENTITY_FIELDS
from pipeline.errors import UserError
from pipeline.methods import Method, Stage, make_method
from pipeline.planning.frozen_models import fetch_models
from pipeline.planning.replicas import ranks_per_replica
from pipeline.prompts.parts.base import entry_of, kind_of
from pipeline.ranks.world import agreed_node_size, on_main
from pipeline.runs.attempts import Attempt, newest_attempt, refuse_half_undone
from pipeline.runs.recorded import recorded_base_model
from pipeline.runs.session import Session
from pipeline.sequence.data import RunData, open_data
from pipeline.sequence.engine import require_learnable
from pipeline.sequence.evaluate import require_own_images
from pipeline.sequence.models import Models
from pipeline.sequence.results import RunResults
from pipeline.sequence.stage_files import StageFiles
from pipeline.sequence.switches import require_switches
from pipeline.sequence.vllm import require_answerable
from pipeline.training.deepspeed_config import require_whole_weights


@dataclass(frozen=True)
class OpenRun:
    """The objects that training, evaluation and record of a run share."""

    recipe: Recipe
    session: Session
    data: RunData
    files: StageFiles
    models: Models
    made_by: dict[str, str]  # fingerprints of base model and its files; answers depend on both, stages on the first
    results: RunResults

    @property
    def method(self) -> Method:
        """The method that the recipe names."""
        return make_method(self.recipe.method)

    @property
    def stages(self) -> list[Stage]:
        """All stages of the sequence, in order."""
        return self.method.stages([task.name for task in self.recipe.data.tasks])


def require_fitting(recipe: Recipe) -> None:
    """Raise UserError where a method's parts, router, rule and evaluation settings are incompatible."""
    method = make_method(recipe.method)
    require_learnable(method)  # its routing refuses options that the chosen router or rule does not have
    require_own_images(entry_of(method), recipe.evaluate.share_images)
    kind_of(method).require_attention(method, recipe.model.attn_implementation)
    require_quantiser(recipe.model.quantization)
    require_answerable(recipe)
    require_switches(recipe)
    require_head(method)


def require_head(method: Method) -> None:
    """Raise UserError where answer heads are asked for and nothing says whose task's head a sample gets."""
    if method.options.keeps_answer_heads and not (method.routing.finds or method.needs_task):
        raise UserError(
            f"method.answer_head: {method.title} does not choose modules by a sample's task, whose head would weigh "
            "its answer; expected none, or a selection by the tasks' similarity."
        )


def open_run(recipe: Recipe, session: Session, answers: bool = True, trains: bool = True) -> OpenRun:
    """Fetch the models and open the data of a run on every rank; UserError when something is missing or damaged.

    With `answers` the ranks are those that evaluate, and `evaluate.engine` has to fit them. With `trains` a stage that
    a further attempt will replace is one to be trained, else it is finished.
    """
    world, path = session.world, session.path
    attempt = on_main(world, lambda: _attempt(path, trains))
    require_fitting(recipe)
    require_whole_weights(recipe.train, recipe.model.quantization)
    shards = ranks_per_replica(recipe.evaluate, recipe.model, world.size, agreed_node_size()) if answers else 1
    fetch_models(recipe.model, recipe.keys, world, lambda: session.stop_if_told("while models are fetched"))
    data = open_data(recipe, world, True, lambda: session.stop_if_told("while the data was looked through"))

    def constants() -> dict[str, Any]:
        return {
            "base_model": base_fingerprint(recipe.model, recorded_base_model(path)),
            "clip": {name: data.identity[name] for name in IDENTITY_FIELDS},
        }

    fixed = on_main(world, constants)
    model_files = on_main(world, lambda: settings_fingerprint(recipe.model, recipe.evaluate.repetition_penalty))
    names = [task.name for task in recipe.data.tasks]
    prints = [shards.fingerprint for shards, *_ in data.train]
    return OpenRun(
        recipe=recipe,
        session=session,
        data=data,
        files=StageFiles(session, list(zip(names, prints, strict=True)), fixed, attempt),
        models=Models(recipe, world, data.train[0][1].image.shape[1], session.watchdog, data.telling, shards),
        made_by={"base_model": fixed["base_model"], "model_files": model_files},
        results=RunResults(path),
    )


def _attempt(run: Path, trains: bool) -> Attempt | None:
    """The newest attempt at the last stage, for a call that trains; UserError for a run that is being undone."""
    refuse_half_undone(run)
    return newest_attempt(run) if trains else None
