"""The adapter: the learned pool of all finished stages as one small portable folder, and what answering needs of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.backbones.clip import key_identity
from pipeline.backbones.lmm import DTYPES, base_fingerprint
from pipeline.config.load import load_run
from pipeline.config.method import MethodField, of_a_record
from pipeline.config.models import KeysConfig, ModelConfig
from pipeline.config.recipe import Recipe
from pipeline.data.key_file import IDENTITY_FIELDS
from pipeline.errors import UserError
from pipeline.files.atomic import replacing, sha256, write_json
from pipeline.methods import make_method
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.stage_files import load_stage
from pipeline.runs.claim import check_stage
from pipeline.runs.layout import stage_folder
from pipeline.runs.recorded import recorded_base_model

if TYPE_CHECKING:
    from pipeline.adapter.answering import Answerer, Source

FORMAT_VERSION = 2
TENSORS, META, PROJECTOR, CARD = "prompts.safetensors", "adapter.json", "projector.safetensors", "README.md"


class Meta(BaseModel):
    """What stands in adapter.json."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    format: int
    sets: list[str]
    tasks: list[str]
    recipe: str
    method: MethodField
    model: ModelConfig
    clip: KeysConfig
    base_model: str  # fingerprint
    keys: dict[str, str]  # identity of the CLIP
    max_new_tokens: int
    projector: str = "frozen"
    repetition_penalty: float | Literal["checkpoint"] = "checkpoint"  # which adapters of earlier versions had
    scores: dict[str, float | None] = {}  # task -> last score in percent
    metrics: dict[str, Any] = {}
    licence: str | None = None
    sha256: str = ""  # of the prompt sets
    projector_sha256: str = ""  # empty in adapters of earlier versions, and without a trained projector


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: what it holds and what it belongs to."""

    meta: Meta
    pool: PromptPool
    projector: dict[str, Tensor] = field(default_factory=dict)


def read_pool(run: Path, recipe: Recipe) -> PromptPool:
    """Return the pool of a run's finished stages.

    Raises UserError when no stage is finished, one is damaged, or model or CLIP are not those it was trained with.
    """
    identity = key_identity(*recipe.keys.source)
    expected = {
        "base_model": base_fingerprint(recipe.model, recorded_base_model(run)),
        "clip": {name: identity[name] for name in IDENTITY_FIELDS},
    }
    pool = PromptPool()
    stages = make_method(recipe.method).stages([task.name for task in recipe.data.tasks])
    for index, stage in enumerate(stages):
        checkpoint = load_stage(run, index, stage.name)
        if checkpoint is None:
            break
        check_stage(stage_folder(run, index, stage.name), checkpoint.meta, expected)
        pool.append(stage.name, checkpoint.prompt, checkpoint.prototype)
    if stages and not len(pool):
        raise UserError(f"{run} has no finished stage yet; let `python -m pipeline run` finish at least one.")
    return pool


def read_projector(run: Path, recipe: Recipe) -> dict[str, Tensor]:
    """Return the image projector as the last finished stage left it, by its names in the projector.

    Empty when `train.projector` is frozen. `read_pool` has checked the stages.
    """
    projector: dict[str, Tensor] = {}
    for index, stage in enumerate(make_method(recipe.method).stages([task.name for task in recipe.data.tasks])):
        checkpoint = load_stage(run, index, stage.name)
        if checkpoint is None:
            break
        projector = checkpoint.projector
    return projector


def export(run: Path, target: Path, licence: str | None = None) -> dict[str, Any]:
    """Write a run's adapter into the folder `target` and return what it holds.

    Raises UserError as `read_pool`, and when `target` holds something else.
    """
    recipe = load_run(run)
    _refuse_foreign(target)
    pool = read_pool(run, recipe)
    if not len(pool):
        raise UserError(f"{run} learned nothing (method {recipe.method.name}); there is no adapter to export.")
    from pipeline.runs.folder import read_run

    scored = read_run(run)
    meta = Meta(
        format=FORMAT_VERSION,
        sets=pool.names,
        tasks=[task.name for task in recipe.data.tasks],
        recipe=recipe.name,
        method=recipe.method.after(len(recipe.data.tasks)),
        model=recipe.model,
        clip=recipe.keys,
        base_model=base_fingerprint(recipe.model, recorded_base_model(run)),
        keys=key_identity(*recipe.keys.source),
        max_new_tokens=max(task.max_new_tokens for task in recipe.data.tasks),
        projector=recipe.train.projector,
        repetition_penalty=recipe.evaluate.repetition_penalty,
        scores=dict(zip(scored.tasks, scored.last_scores, strict=True)),
        metrics={name: value for name, value in scored.metrics().items() if value is not None},
        licence=licence,
    )
    projector = read_projector(run, recipe) if recipe.train.projector == "trained" else {}
    return write_adapter(Adapter(meta, pool, projector), target)


def write_adapter(adapter: Adapter, target: Path) -> dict[str, Any]:
    """Write an adapter into a new, empty or adapter's folder and return what it holds.

    `prompts.safetensors` has prompts [T, L, D] in the model's precision and prototypes [T, K]; `adapter.json` says what
    they belong to and how sets are selected, `README.md` the same for people; a trained image projector is
    `projector.safetensors`.
    """
    from pipeline.adapter.card import card

    _refuse_foreign(target)
    pool, dtype = adapter.pool, DTYPES[adapter.meta.model.dtype]
    with replacing(target / TENSORS) as temporary:
        save_file(
            {"prompts": pool.prompts.to(dtype).contiguous(), "prototypes": pool.prototypes.contiguous()},
            temporary,
            metadata={"names": "\n".join(pool.names), "format": "prompt-pool-1"},
        )
    (target / PROJECTOR).unlink(missing_ok=True)
    if adapter.projector:
        with replacing(target / PROJECTOR) as temporary:
            save_file({k: v.to(dtype).contiguous() for k, v in adapter.projector.items()}, temporary)
    sums = {"sha256": sha256(target / TENSORS)}
    sums["projector_sha256"] = sha256(target / PROJECTOR) if adapter.projector else ""
    meta = adapter.meta.model_copy(update={"sets": pool.names, **sums})
    write_json(target / META, meta.model_dump(mode="json"))
    with replacing(target / CARD) as temporary:
        temporary.write_text(card(meta, tuple(pool.prompts.shape)), encoding="utf-8")
    size = sum(path.stat().st_size for path in target.iterdir())
    return {"adapter": str(target), "sets": pool.names, "bytes": size}


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder; UserError when it is none, damaged, or of another format."""
    try:
        content = json.loads((folder / META).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"'{folder}' has no {META}; expected the folder of an adapter, which `python -m pipeline export` writes."
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / META} is not JSON ({error}); export the run again.") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT_VERSION:
        raise UserError(f"{folder} has adapter format {found}, expected {FORMAT_VERSION}; export the run again.")
    try:
        meta = Meta.model_validate({**content, "method": of_a_record(content.get("method"))})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{folder / META}: {place}: {first['msg']}; export the run again.") from None
    for name, sum_ in ((TENSORS, meta.sha256), (PROJECTOR, meta.projector_sha256)):
        if (name == TENSORS or sum_) and (not (folder / name).is_file() or sha256(folder / name) != sum_):
            raise UserError(f"{folder / name} is missing or not the file that {META} describes; export the run again.")
    try:
        pool = PromptPool.load(folder / TENSORS)
        projector = load_file(folder / PROJECTOR) if meta.projector == "trained" else {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"the tensors of {folder} cannot be read ({error}); export the run again.") from None
    if pool.names != meta.sets or len(pool.prompts) != len(pool.names) or len(pool.prototypes) != len(pool.names):
        raise UserError(f"{folder / TENSORS} does not hold the sets that {META} names; export the run again.")
    return Adapter(meta, pool, projector)


def source_of(path: Path, model: str | None = None, clip: str | None = None) -> Source:
    """Return what answering needs of a run's or an adapter's folder.

    `model` and `clip` say where the frozen models are on this machine, if not where they were. Raises UserError when
    the folder is neither, or the models are not those the pool was trained with.
    """
    from pipeline.adapter.answering import Source

    if (path / META).is_file():
        adapter = read_adapter(path)
        meta, pool, projector = adapter.meta, adapter.pool, adapter.projector
        model_config, keys = _moved(meta.model, model), _moved(meta.clip, clip)
        _require_same_models(path, meta, model_config, keys)
        longest, penalty = meta.max_new_tokens, meta.repetition_penalty
        return Source(pool, meta.tasks, meta.method, model_config, keys, longest, projector, penalty)
    recipe = load_run(path)
    recipe = recipe.model_copy(update={"model": _moved(recipe.model, model), "keys": _moved(recipe.keys, clip)})
    pool = read_pool(path, recipe)
    projector = read_projector(path, recipe) if recipe.train.projector == "trained" else {}
    longest = max(task.max_new_tokens for task in recipe.data.tasks)
    tasks = [task.name for task in recipe.data.tasks]
    penalty = recipe.evaluate.repetition_penalty
    return Source(pool, tasks, recipe.method, recipe.model, recipe.keys, longest, projector, penalty)


def load_adapter(
    path: str | Path, model: str | None = None, clip: str | None = None, device: str | None = None
) -> Answerer:
    """Load an adapter (or a run) with its frozen models, ready to be asked.

    `model` and `clip` are folders or hub ids where the adapter's own are not found on this machine; `device` as torch
    names it, by default a GPU where there is one. Raises UserError as `source_of`.
    """
    from pipeline.adapter.answering import Answerer

    return Answerer(source_of(Path(path), model, clip), device)


def _moved(config: Any, path: str | None) -> Any:
    return config if path is None else config.model_copy(update={"path": path, "revision": None})


def _require_same_models(folder: Path, meta: Meta, model: ModelConfig, keys: KeysConfig) -> None:
    found = base_fingerprint(model, meta.base_model)
    if found != meta.base_model:
        raise UserError(
            f"{folder} belongs to another base model (fingerprint {meta.base_model[:22]}, {model.path} has "
            f"{found[:22]}); give the model it was trained on ({meta.model.path}) as --model."
        )
    identity = key_identity(*keys.source)
    differing = [name for name in IDENTITY_FIELDS if identity[name] != meta.keys.get(name)]
    if differing:
        raise UserError(
            f"{folder} belongs to another CLIP than {keys.path} ({', '.join(differing)} differ); give the one it was "
            f"trained with ({meta.clip.path}) as --clip."
        )


def _refuse_foreign(target: Path) -> None:
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / META).is_file())):
        raise UserError(f"'{target}' exists and is not an adapter; expected a new or empty folder.")
