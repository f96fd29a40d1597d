"""The adapter: the learned pool of all finished stages as one small portable folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pipeline.backbones.clip import key_identity
from pipeline.backbones.lmm import DTYPES, base_fingerprint
from pipeline.checkpoint import check_stage, load_stage, stage_folder, write_json
from pipeline.config import Recipe, load_run
from pipeline.data.shards import IDENTITY_FIELDS
from pipeline.errors import UserError
from pipeline.files import replacing, sha256
from pipeline.methods import make_method
from pipeline.prompts.pool import PromptPool

FORMAT_VERSION = 1
TENSORS, META, PROJECTOR = "prompts.safetensors", "adapter.json", "projector.safetensors"


def read_pool(run: Path, recipe: Recipe) -> PromptPool:
    """Return the pool of a run's finished stages.

    Raises UserError when no stage is finished, one is damaged, or model or CLIP are not those it was trained with.
    """
    identity = key_identity(*recipe.keys.source)
    expected = {
        "base_model": base_fingerprint(recipe.model),
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


def export(run: Path, target: Path) -> dict[str, Any]:
    """Write a run's adapter into the folder `target` and return what it holds.

    `prompts.safetensors` has prompts [T, L, D] in the model's precision and prototypes [T, K]; `adapter.json`
    says what they belong to and how sets are selected; a trained image projector is `projector.safetensors`. Raises
    UserError as `read_pool`, and when `target` holds something else.
    """
    recipe = load_run(run)
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / META).is_file())):
        raise UserError(f"'{target}' exists and is not an adapter; expected a new or empty folder.")
    pool = read_pool(run, recipe)
    if not len(pool):
        raise UserError(f"{run} learned nothing (method {recipe.method.name}); there is no adapter to export.")
    with replacing(target / TENSORS) as temporary:
        save_file(
            {
                "prompts": pool.prompts.to(DTYPES[recipe.model.dtype]).contiguous(),
                "prototypes": pool.prototypes.contiguous(),
            },
            temporary,
            metadata={"names": "\n".join(pool.names), "format": "prompt-pool-1"},
        )
    if recipe.train.projector == "trained":
        dtype = DTYPES[recipe.model.dtype]
        with replacing(target / PROJECTOR) as temporary:
            save_file({k: v.to(dtype).contiguous() for k, v in read_projector(run, recipe).items()}, temporary)
    meta = {
        "format": FORMAT_VERSION,
        "projector": recipe.train.projector,
        "sets": pool.names,
        "recipe": recipe.name,
        "method": recipe.method.model_dump(mode="json"),
        "model": {"path": recipe.model.path, "revision": recipe.model.revision, "dtype": recipe.model.dtype},
        "base_model": base_fingerprint(recipe.model),
        "keys": key_identity(*recipe.keys.source),
        "sha256": sha256(target / TENSORS),
    }
    write_json(target / META, meta)
    size = sum(path.stat().st_size for path in target.iterdir())
    return {"adapter": str(target), "sets": pool.names, "bytes": size}
