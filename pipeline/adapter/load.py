"""Loads an adapter or a run with its frozen models for answering."""

from __future__ import annotations

from pathlib import Path

from pipeline.adapter.answering import Answerer
from pipeline.adapter.fitted_routing import FITTED
from pipeline.adapter.format import read_adapter
from pipeline.adapter.from_run import moved, read_pool
from pipeline.adapter.meta import CARD, META, PROJECTOR, TENSORS, Meta
from pipeline.adapter.source import Source
from pipeline.backbones.base_model import base_fingerprint
from pipeline.backbones.clip import key_identity
from pipeline.config.load import load_run
from pipeline.config.models import KeysConfig, ModelConfig
from pipeline.config.unfamiliar import Unfamiliar
from pipeline.data.key_file import IDENTITY_FIELDS
from pipeline.errors import UserError
from pipeline.hub.adapters import adapter_folder, is_on_hub
from pipeline.ranks.collector import collector_paused
from pipeline.runs.recorded import recorded_base_model


def source_of(path: Path, model: str | None = None, clip: str | None = None, answers: bool = True) -> Source:
    """Return pool and settings of a run's or an adapter's folder, or of an adapter on the Hub (`USER/NAME@REVISION`).

    `model` and `clip` are the locations of the frozen models on this machine, where they differ from the recorded
    ones. Without `answers` the frozen model of an adapter need not be here: only sets are chosen. Raises UserError
    when the folder is neither, or the models are not those that the pool was trained with.
    """
    if is_on_hub(str(path)):
        path = adapter_folder(str(path), (META, TENSORS), (PROJECTOR, FITTED, CARD))
    if (path / META).is_file():
        adapter = read_adapter(path)
        meta, pool = adapter.meta, adapter.pool
        model_config, keys = moved(meta.model, model), moved(meta.clip, clip)
        if answers:
            require_same_model(path, meta, model_config)
        require_same_keys(path, meta, keys)
        longest, penalty = meta.max_new_tokens, meta.repetition_penalty
        return Source(pool, meta.tasks, meta.method, model_config, keys, longest, penalty, meta.base_model)
    recipe = load_run(path)
    recipe = recipe.model_copy(update={"model": moved(recipe.model, model), "keys": moved(recipe.keys, clip)})
    pool = read_pool(path, recipe)
    longest = max(task.max_new_tokens for task in recipe.data.tasks)
    tasks = [task.name for task in recipe.data.tasks]
    penalty = recipe.evaluate.repetition_penalty
    base = base_fingerprint(recipe.model, recorded_base_model(path))
    return Source(pool, tasks, recipe.method, recipe.model, recipe.keys, longest, penalty, base)


def load_adapter(
    path: str | Path,
    model: str | None = None,
    clip: str | None = None,
    device: str | None = None,
    unfamiliar: Unfamiliar | None = None,
) -> Answerer:
    """Load an adapter or a run with its frozen models; `ask` and `answer` of the result answer questions.

    Args:
        path: folder of the adapter or run, or an adapter on the Hugging Face Hub as `USER/NAME` or
            `USER/NAME@REVISION`, a commit or branch.
        model: folder or Hub id of the frozen model, where the recorded one is not on this machine.
        clip: the same for the CLIP.
        device: torch's name of a device; None: a GPU where there is one.
        unfamiliar: what becomes of questions that resemble no task, None: as the method says.

    Raises UserError as `source_of` and `Source.with_unfamiliar` do.
    """
    with collector_paused():
        return Answerer(source_of(Path(path), model, clip).with_unfamiliar(unfamiliar), device)


def require_same_models(folder: Path, meta: Meta, model: ModelConfig, keys: KeysConfig) -> None:
    """Raise UserError unless `model` and `keys` are the frozen models that an adapter in `folder` was trained with."""
    require_same_model(folder, meta, model)
    require_same_keys(folder, meta, keys)


def require_same_model(folder: Path, meta: Meta, model: ModelConfig) -> None:
    """Raise UserError unless `model` is the frozen model that an adapter in `folder` was trained with."""
    found = base_fingerprint(model, meta.base_model)
    if found != meta.base_model:
        raise UserError(
            f"{folder} belongs to another base model (fingerprint {meta.base_model[:22]}, {model.path} has "
            f"{found[:22]}); give the model it was trained on ({meta.model.path}) as --model."
        )


def require_same_keys(folder: Path, meta: Meta, keys: KeysConfig) -> None:
    """Raise UserError unless `keys` name the frozen CLIP that an adapter in `folder` was trained with."""
    identity = key_identity(*keys.source)
    differing = [name for name in IDENTITY_FIELDS if identity[name] != meta.keys.get(name)]
    if differing:
        raise UserError(
            f"{folder} belongs to another CLIP than {keys.path} ({', '.join(differing)} differ); give the one it was "
            f"trained with ({meta.clip.path}) as --clip."
        )
