"""Exports a run's pool as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.adapter.format import Adapter, refuse_foreign, write_adapter
from pipeline.adapter.meta import FORMAT_VERSION, Meta
from pipeline.backbones.base_model import base_fingerprint
from pipeline.backbones.clip import key_identity
from pipeline.config.load import load_run
from pipeline.config.recipe import Recipe
from pipeline.data.key_file import IDENTITY_FIELDS
from pipeline.errors import UserError
from pipeline.files.paths import command
from pipeline.methods import make_method
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.stage_files import StageCheckpoint, add_stage, load_stage
from pipeline.runs.attempts import STAGE, newest_attempt
from pipeline.runs.claim import check_stage
from pipeline.runs.finished import read_finished
from pipeline.runs.folder import read_run
from pipeline.runs.layout import CONFIG, REPLACED, stage_folder
from pipeline.runs.recorded import recorded_base_model
from pipeline.runs.replacement import refuse_half_replaced


def read_pool(run: Path, recipe: Recipe) -> PromptPool:
    """Return the pool of a run's finished stages; of one that is just being replaced the former.

    Raises UserError when no stage is finished, one is damaged, states are half replaced (`adopt_routing`,
    `adopt_heads`), or model or CLIP are not those it was trained with.
    """
    refuse_half_replaced(run)
    identity = key_identity(*recipe.keys.source)
    expected = {
        "base_model": base_fingerprint(recipe.model, recorded_base_model(run)),
        "clip": {name: identity[name] for name in IDENTITY_FIELDS},
    }
    pool = PromptPool()
    stages = make_method(recipe.method).stages([task.name for task in recipe.data.tasks])
    for index, stage in enumerate(stages):
        checkpoint = load_stage(run, index, stage.name) or _former(run, index)
        if checkpoint is None:
            break
        check_stage(stage_folder(run, index, stage.name), checkpoint.meta, expected)
        add_stage(pool, stage.name, checkpoint.tensors)
    if stages and not len(pool):
        raise UserError(f"{run} has no finished stage yet; let `python -m pipeline run` finish at least one.")
    return pool


def _former(run: Path, index: int) -> StageCheckpoint | None:
    """The stage that is being replaced, where the new one is not in its place yet or a process was killed then."""
    attempt = newest_attempt(run)
    if attempt is None or not attempt.is_of(index):
        return None
    folder = run / REPLACED / attempt.former / STAGE
    found = read_finished(folder, f"Let `{command('run', run / CONFIG)}` complete the stage that replaces it.")
    return None if found is None else StageCheckpoint(*found)


def export(run: str | Path, target: str | Path, licence: str | None = None) -> dict[str, Any]:
    """Write the adapter of the run in the folder `run` into the folder `target` and return its contents.

    Raises UserError as `adapter_of_run` does, and when `target` is neither new, empty nor an adapter.
    """
    target = Path(target)
    refuse_foreign(target)
    return write_adapter(adapter_of_run(Path(run), licence), target)


def adapter_of_run(run: Path, licence: str | None = None, model: str | None = None) -> Adapter:
    """What a run has learned, as an adapter in memory; `model` is the frozen model's location, if not the recorded one.

    Raises UserError as `read_pool` does, and where nothing was learned.
    """
    recipe = load_run(run)
    if model is not None:
        recipe = recipe.model_copy(update={"model": moved(recipe.model, model)})
    pool = read_pool(run, recipe)
    if not len(pool):
        raise UserError(f"{run} learned nothing (method {recipe.method.name}); there is no adapter to export.")
    scored = read_run(run)
    meta = _meta(recipe, pool.names, base_fingerprint(recipe.model, recorded_base_model(run)), licence)
    known = {
        "keys": key_identity(*recipe.keys.source),
        "scores": dict(zip(scored.tasks, scored.last_scores, strict=True)),
        "metrics": {name: value for name, value in scored.metrics().items() if value is not None},
    }
    return Adapter(meta.model_copy(update=known), pool)


def adapter_of_recipe(recipe: Recipe, licence: str | None = None, model: str | None = None) -> Adapter:
    """What a recipe's runs will have in common, as an adapter in memory without sets; for `model` see the above."""
    recipe = recipe.model_copy(update={"model": moved(recipe.model, model)})
    return Adapter(_meta(recipe, [], base_fingerprint(recipe.model), licence), PromptPool())


def _meta(recipe: Recipe, sets: list[str], base_model: str, licence: str | None) -> Meta:
    """An adapter's description, without what only a run knows."""
    return Meta(
        format=FORMAT_VERSION,
        sets=sets,
        tasks=[task.name for task in recipe.data.tasks],
        recipe=recipe.name,
        method=recipe.method.after(len(recipe.data.tasks)),
        model=recipe.model,
        clip=recipe.keys,
        base_model=base_model,
        keys={},
        max_new_tokens=max(task.max_new_tokens for task in recipe.data.tasks),
        projector=recipe.train.projector,
        repetition_penalty=recipe.evaluate.repetition_penalty,
        licence=licence,
    )


def moved(config: Any, path: str | None) -> Any:
    """The configuration of a frozen model that is at `path`; None: where it was."""
    return config if path is None else config.model_copy(update={"path": path, "revision": None})
