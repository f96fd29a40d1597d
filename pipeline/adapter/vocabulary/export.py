"""Exports prompt sets as a checkpoint in which each set is a run of special tokens."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pipeline.adapter.format import Adapter, read_adapter, write_adapter
from pipeline.adapter.from_run import adapter_of_run, moved
from pipeline.adapter.load import require_same_models
from pipeline.adapter.meta import META
from pipeline.adapter.vocabulary.files import Frozen, require_space, write_frozen, write_index
from pipeline.adapter.vocabulary.page import page
from pipeline.adapter.vocabulary.proof import Run, prove
from pipeline.adapter.vocabulary.settings import Tables as Sizes
from pipeline.adapter.vocabulary.settings import conversation_of, write_config, write_generation, write_settings
from pipeline.adapter.vocabulary.tables import EMBEDDING_FILE, HEAD_FILE, Tables, tables_of
from pipeline.adapter.vocabulary.template import ARGUMENT, Places
from pipeline.adapter.vocabulary.tokens import SetTokens, identity_of, next_token, refuse_marks
from pipeline.backbones.lmm_families import family_of
from pipeline.backbones.lmm_processor import load_processor, source_of
from pipeline.backbones.lmm_weights import DTYPES, require_fitting_weights
from pipeline.config.method import MethodOptions, choice_name
from pipeline.errors import UserError
from pipeline.files.atomic import sync_folder, temporary_of, write_json
from pipeline.hub.snapshots import checkpoint
from pipeline.methods import make_method
from pipeline.prompts.parts.base import entry_of
from pipeline.prompts.parts.input_rows import RowsEntry
from pipeline.prompts.parts.projector import projector_of
from pipeline.prompts.pool import PromptPool

ROUTER, ADAPTER = "prompt_sets.json", "adapter"
FORMAT = 1


@dataclass(frozen=True)
class Export:
    """What is to be written: the adapter, and what its frozen model's checkpoint has."""

    adapter: Adapter
    run: Run
    base: Path
    tables: Tables
    tokens: SetTokens
    places: Places

    @property
    def size(self) -> int:
        """Rows of the new tables."""
        return self.tables.size(self.tokens)


def export_vocabulary(
    source: Path, target: Path, model: str | None = None, licence: str | None = None, link: bool = True
) -> dict[str, Any]:
    """Write a checkpoint with a run's or an adapter's prompt sets in its vocabulary; returns its contents.

    Everything is written beside `target` and renamed at the end. One tensor is in memory at a time.

    Args:
        source: folder of a run or an adapter.
        target: the new checkpoint's folder, new or empty.
        model: location of the frozen model on this machine, None: as recorded.
        licence: of the prompt sets, None: as the adapter says.
        link: whether files of frozen weights are linked where the file system can.

    Raises UserError where `target` has files, the modules are no prompt sets, a template cannot express how they
    enter, the checkpoint is missing or another one, or the disk is too small.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"'{target}' exists and is not empty; expected a new or empty folder for the checkpoint.")
    export = _planned(source, model, licence)
    tables, tokens = export.tables, export.tokens
    frozen = Frozen.of(tables.tensors, tables.replaced)
    dtype = DTYPES[export.run.model.dtype]
    table_bytes = export.size * tables.width * dtype.itemsize
    require_space(target, tables.tensors, frozen, 2 * table_bytes, link)
    temporary = temporary_of(target)
    try:
        temporary.mkdir(parents=True)
        write_settings(export.base, temporary, export.run.conversation, export.run.model, tokens, export.places)
        _write_numbers(export, temporary)
        prove(export.run, temporary, tokens)
        vectors = export.adapter.pool.prompts.flatten(0, 1)  # [T L, D]
        tables.write_embedding(temporary / EMBEDDING_FILE, vectors, tokens, dtype)
        tables.write_head(temporary / HEAD_FILE, tokens, dtype)
        linked = write_frozen(temporary, tables.tensors, frozen, link)
        added = {tables.embedding: (EMBEDDING_FILE, table_bytes), tables.head: (HEAD_FILE, table_bytes)}
        write_index(temporary, tables.tensors, frozen, added)
        require_fitting_weights(export.run.model.model_copy(update={"path": str(target)}), temporary)
        write_adapter(export.adapter, temporary / ADAPTER)
        sync_folder(temporary)
        temporary.rename(target)  # an empty folder is replaced
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{target}' could not be written ({error}); make room, or give another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return {
        "checkpoint": str(target),
        "sets": list(tokens.names),
        "tokens": tokens.count,
        "vocabulary": [tables.rows, export.size],
        "bytes": size,
        "linked_bytes": linked,
    }


def _planned(source: Path, model: str | None, licence: str | None) -> Export:
    """Read what is exported and refuse what cannot be; computes nothing."""
    adapter = _adapter(source, model, licence)
    require_rows(adapter.meta.method, adapter.pool, source)
    config, pool = adapter.meta.model, adapter.pool
    base = checkpoint(source_of(config)).folder
    tables = tables_of(base)
    length, width = pool.prompts.shape[1:]
    if width != tables.width:
        raise UserError(
            f"The prompt sets of {source} are {width} wide and the model '{config.path}' {tables.width}; expected the "
            "model that they were learned with."
        )
    processor = load_processor(config)
    refuse_marks(processor.tokenizer, config.path)
    family = family_of(tables.kind)
    if family.scales_embeddings:
        raise UserError(
            f"A model of type {tables.kind} multiplies the rows of its embedding table, in the precision of its "
            "weights, so most vectors are no row of it; expected a model of another type, or `export` as an adapter."
        )
    identity = identity_of(pool.names, pool.prompts, DTYPES[config.dtype])
    tokens = SetTokens(pool.names, length, next_token(processor.tokenizer), identity)
    method = make_method(adapter.meta.method)
    entry = entry_of(method)
    run = Run(conversation_of(processor, config), family, config, entry.insertion or "after_bos")
    places = Places.of(run.conversation, family, run.insertion)
    return Export(adapter, run, base, tables, tokens, places)


def _adapter(source: Path, model: str | None, licence: str | None) -> Adapter:
    """The adapter of a run or in a folder, with the frozen model where it is on this machine."""
    if not (source / META).is_file():
        return adapter_of_run(source, licence, model)
    adapter = read_adapter(source)
    config = moved(adapter.meta.model, model)
    require_same_models(source, adapter.meta, config, adapter.meta.clip)
    return Adapter(
        adapter.meta.model_copy(update={"model": config, "licence": licence or adapter.meta.licence}), adapter.pool
    )


def require_rows(options: MethodOptions, pool: PromptPool, source: Path) -> None:
    """Raise UserError where modules are no rows that can stand in an embedding table, whatever the question."""
    method = make_method(options)
    otherwise = "`export` without --as, or with --as adapter, writes them as an adapter."
    if type(entry_of(method)) is not RowsEntry:
        part = "none" if method.part is None else choice_name(method.part)
        raise UserError(
            f"{source} learned modules of the part {part} (method {method.name}), which are no rows of an embedding "
            f"table; expected prompt sets, the part input_rows. {otherwise}"
        )
    if projector_of(pool.shared):
        raise UserError(
            f"{source} learned the image projector too (train.projector), and a vocabulary holds prompt sets alone; "
            f"expected train.projector frozen. {otherwise}"
        )
    modules = len(pool)
    chosen = method.routing.rule.inference(torch.zeros(1, modules), torch.zeros(1, dtype=torch.long))
    if chosen.weights is not None:
        raise UserError(
            f"The method {method.name} of {source} multiplies prompt sets by weights that depend on the question, "
            f"which tokens cannot have; expected one whose sets count alike. {otherwise}"
        )


def _write_numbers(export: Export, folder: Path) -> None:
    """Write configuration, generation settings, the list of the sets for a router, and a page for people."""
    run, tokens, meta = export.run, export.tokens, export.adapter.meta
    write_config(export.base, folder, Sizes(export.size, run.model.dtype), run.conversation.processor)
    spare = range(max(export.tables.rows, tokens.end), export.size)
    never = [*range(tokens.first, tokens.end), *spare]
    write_generation(export.base, folder, run.conversation, never, meta.repetition_penalty)
    content = {
        "format": FORMAT,
        "argument": ARGUMENT,
        "identity": tokens.identity,
        "insertion": run.insertion,
        "length": tokens.length,
        "sets": {name: tokens.ids(name) for name in tokens.names},
        "adapter": ADAPTER,
    }
    write_json(folder / ROUTER, content)
    (folder / "README.md").write_text(page(meta, tokens), encoding="utf-8")
