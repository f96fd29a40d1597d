"""Prompt sets as folders of PEFT's prompt tuning, and back.

PEFT puts its vectors before the first token of a sequence, a set with `insertion: after_bos` stands behind it. The two
agree where PEFT's first vector is the embedding of the first token and its sequence begins with the second token: that
is how a set is written, and what a folder needs to be read. PEFT's other forms have no counterpart here.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.adapter.format import Adapter, read_adapter, write_adapter
from pipeline.adapter.from_run import adapter_of_run, moved
from pipeline.adapter.load import require_same_model
from pipeline.adapter.meta import META
from pipeline.adapter.vocabulary.export import require_rows
from pipeline.adapter.vocabulary.settings import conversation_of
from pipeline.adapter.vocabulary.tables import tables_of
from pipeline.backbones.lmm_processor import load_processor, source_of
from pipeline.backbones.lmm_weights import DTYPES
from pipeline.data.sample import Sample
from pipeline.errors import UserError, nearest
from pipeline.files.atomic import sync_folder, temporary_of, write_json
from pipeline.hub.snapshots import checkpoint
from pipeline.methods import make_method
from pipeline.prompts.parts.base import entry_of
from pipeline.prompts.parts.input_rows import PROMPT
from pipeline.prompts.pool import PromptPool

CONFIG, WEIGHTS, TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
KIND = "PROMPT_TUNING"
# Architectures whose logits under PEFT a test compares. Others need positions or masks that PEFT does not pass on.
COMPARED = ("llava",)


@dataclass(frozen=True)
class First:
    """The first token of every conversation, and its row of the embedding table [D] in the model's precision."""

    token: int
    row: Tensor


def export_peft(source: Path, target: Path, model: str | None = None) -> dict[str, Any]:
    """Write a folder of PEFT's prompt tuning for each set of a run or an adapter; returns the contents.

    Args:
        source: folder of a run or an adapter.
        target: new or empty folder, which gets one folder for each set.
        model: location of the frozen model on this machine, None: as recorded.

    Raises UserError where `target` has files, and where PEFT cannot express how the sets enter the model.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"'{target}' exists and is not empty; expected a new or empty folder for PEFT's files.")
    adapter = _adapter(source, model)
    first = _first(source, adapter)
    pool, temporary = adapter.pool, temporary_of(target)
    try:
        for name, prompts in zip(pool.names, pool.prompts, strict=True):
            folder = temporary / name
            folder.mkdir(parents=True)
            vectors = torch.cat([first.row.float()[None], prompts.float()])
            save_file({TENSOR: vectors.contiguous()}, folder / WEIGHTS, metadata={"format": "pt"})
            write_json(folder / CONFIG, _config(adapter, vectors))
        (temporary / "README.md").write_text(_page(adapter, first), encoding="utf-8")
        sync_folder(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"peft": str(target), "sets": pool.names, "virtual_tokens": int(pool.prompts.shape[1]) + 1}


def from_peft(source: Path, name: str, folder: Path, target: Path, model: str | None = None) -> dict[str, Any]:
    """Write an adapter in which the vectors of the set `name` are those of a folder of PEFT's prompt tuning.

    What the set keeps for routing stays as it is. Raises UserError for a folder that PEFT did not write, or whose
    vectors do not stand where a set's do.
    """
    adapter = _adapter(source, model)
    pool = adapter.pool
    if name not in pool.names:
        known = ", ".join(pool.names)
        raise UserError(f"{source} has no set '{name}'; expected one of {known}.{nearest(name, pool.names)}")
    first = _first(source, adapter)
    vectors = _read(folder)
    wanted = (pool.prompts.shape[1] + 1, pool.prompts.shape[2])
    if tuple(vectors.shape) != wanted:
        raise UserError(
            f"{folder} has {len(vectors)} vectors of width {vectors.shape[-1]}; expected {wanted[0]} of width "
            f"{wanted[1]}: the embedding of the first token and the {wanted[0] - 1} of each set of {source}."
        )
    dtype = DTYPES[adapter.meta.model.dtype]
    if not torch.equal(vectors[0].to(dtype), first.row.to(dtype)):
        raise UserError(
            f"The first vector of {folder} is not the embedding of the first token ({first.token}), so its vectors "
            "stand before that token and a set's behind it; expected a folder that `export --as peft` made, trained "
            "further with its first vector as it was."
        )
    prompts = pool.prompts.clone()
    prompts[pool.names.index(name)] = vectors[1:].to(prompts)
    changed = PromptPool(pool.names, {**pool.tensors, PROMPT: prompts}, pool.states, pool.shared)
    scores = {task: score for task, score in adapter.meta.scores.items() if task != name}
    meta = adapter.meta.model_copy(update={"scores": scores, "metrics": {}})
    return write_adapter(Adapter(meta, changed), target)


def _adapter(source: Path, model: str | None) -> Adapter:
    """The adapter of a run or in a folder, with the frozen model where it is on this machine."""
    if not (source / META).is_file():
        return adapter_of_run(source, model=model)
    adapter = read_adapter(source)
    config = moved(adapter.meta.model, model)
    require_same_model(source, adapter.meta, config)
    return Adapter(adapter.meta.model_copy(update={"model": config}), adapter.pool)


def _first(source: Path, adapter: Adapter) -> First:
    """The first token of conversations with the frozen model; UserError where PEFT cannot express its sets."""
    meta = adapter.meta
    require_rows(meta.method, adapter.pool, source)
    insertion = entry_of(make_method(meta.method)).insertion
    if insertion != "after_bos":
        raise UserError(
            f"The sets of {source} stand {str(insertion).replace('_', ' ')} (method.insertion), and PEFT's vectors at "
            "the start of a sequence; expected after_bos. `export --as vocabulary` writes them for any server."
        )
    base = checkpoint(source_of(meta.model)).folder
    tables = tables_of(base)
    if tables.kind not in COMPARED:
        raise UserError(
            f"The frozen model of {source} is of type {tables.kind}, whose decoder needs more than PEFT's prompt "
            f"tuning passes on, or was not compared with it; expected {', '.join(COMPARED)}. `export` without --as "
            "writes an adapter."
        )
    conversation = conversation_of(load_processor(meta.model), meta.model)
    token = conversation.example_of(Sample("first", None, "?", ""), None).prompt[0]
    with safe_open(str(tables.tensors[tables.embedding].file), framework="pt") as file:
        row = file.get_slice(tables.embedding)[token : token + 1][0]
    return First(token, row.to(DTYPES[meta.model.dtype]))


def _config(adapter: Adapter, vectors: Tensor) -> dict[str, Any]:
    """adapter_config.json; PEFT takes numbers of layers and heads from the model."""
    return {
        "peft_type": KIND,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.meta.model.path,
        "inference_mode": True,
        "num_virtual_tokens": len(vectors),
        "token_dim": vectors.shape[1],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }


def _read(folder: Path) -> Tensor:
    """The vectors [V, D] of a folder of PEFT's prompt tuning; UserError for any other."""
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"'{folder}' cannot be read as an adapter of PEFT ({error}); expected {CONFIG} and {WEIGHTS}, as "
            "save_pretrained writes them."
        ) from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != KIND:
        raise UserError(f"{folder} is PEFT's {kind}; expected {KIND}, which alone is a row of vectors at the input.")
    found = tensors.get(TENSOR)
    if found is None or found.ndim != 2 or not torch.isfinite(found).all():
        raise UserError(f"{folder / WEIGHTS} has no finite matrix '{TENSOR}'; save the adapter again with PEFT.")
    return found.float()


def _page(adapter: Adapter, first: First) -> str:
    """README.md: how the folders are used, and what of the adapter they do not have."""
    meta = adapter.meta
    return f"""# {meta.recipe}: prompt sets for PEFT

One folder of PEFT's prompt tuning for each set: {", ".join(adapter.pool.names)}. They belong to the
frozen model `{meta.model.path}`. Routing is not in them: PEFT inserts the set that is loaded for every question.

The first of the vectors is the embedding of token {first.token}, with which every conversation begins, so the model is
called without that token:

```python
model = PeftModel.from_pretrained(frozen_model, "{adapter.pool.names[0]}")
inputs = processor(text=prompt, images=image, return_tensors="pt")
logits = model(
    input_ids=inputs["input_ids"][:, 1:],
    attention_mask=inputs["attention_mask"][:, 1:],
    pixel_values=inputs["pixel_values"],
).logits
```
"""
