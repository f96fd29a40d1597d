"""Exports the checkpoint of a frozen model for other servers: with prompt sets as runs of special tokens, or with one
token in whose place a request's vectors go."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.adapter.format import Adapter, read_adapter, write_adapter
from pipeline.adapter.from_run import adapter_of_recipe, adapter_of_run, moved
from pipeline.adapter.load import require_same_models
from pipeline.adapter.meta import META
from pipeline.adapter.vocabulary.files import Frozen, require_space, write_frozen, write_index
from pipeline.adapter.vocabulary.lora import LORAS, require_loras, served_names, write_loras
from pipeline.adapter.vocabulary.page import page_of_loras, page_of_parts, page_of_sets
from pipeline.adapter.vocabulary.part import PLACEHOLDER, VECTORS, PartToken, identity_of_places
from pipeline.adapter.vocabulary.proof import Run, prove
from pipeline.adapter.vocabulary.settings import Tables as Sizes
from pipeline.adapter.vocabulary.settings import conversation_of, write_config, write_generation, write_settings
from pipeline.adapter.vocabulary.tables import EMBEDDING_FILE, HEAD_FILE, Tables, tables_of
from pipeline.adapter.vocabulary.template import Places
from pipeline.adapter.vocabulary.tokens import ARGUMENT, SetTokens, identity_of, next_token, refuse_marks
from pipeline.backbones.lmm_families import family_of
from pipeline.backbones.lmm_processor import load_processor, source_of
from pipeline.backbones.lmm_weights import DTYPES, require_fitting_weights
from pipeline.config.load import load_recipe
from pipeline.config.method import MethodOptions, choice_name
from pipeline.errors import UserError
from pipeline.files.atomic import sync_folder, temporary_of, write_json
from pipeline.hub.snapshots import checkpoint
from pipeline.methods import make_method
from pipeline.prompts.answer_head import has_heads
from pipeline.prompts.parts.base import entry_of
from pipeline.prompts.parts.input_rows import RowsEntry
from pipeline.prompts.parts.projector import projector_of
from pipeline.prompts.pool import PromptPool

ROUTER, ADAPTER = "prompt_sets.json", "adapter"
FORMAT = 1
Form: TypeAlias = Literal["vocabulary", "parts", "lora"]


@dataclass(frozen=True)
class Export:
    """What is to be written: the adapter, and what its frozen model's checkpoint has."""

    adapter: Adapter
    run: Run
    base: Path
    tables: Tables
    tokens: SetTokens | PartToken
    places: Places

    @property
    def size(self) -> int:
        """Rows of the new tables."""
        return self.tables.size(self.tokens)

    @property
    def vectors(self) -> Tensor:
        """The rows [count, D] of the new tokens; nobody reads that of a placeholder."""
        if isinstance(self.tokens, PartToken):
            return torch.zeros(1, self.tables.width)
        return self.adapter.pool.prompts.flatten(0, 1)  # [T, L, D] -> [T L, D]


def export_checkpoint(
    source: Path,
    target: Path,
    form: Form = "vocabulary",
    model: str | None = None,
    licence: str | None = None,
    link: bool = True,
) -> dict[str, Any]:
    """Write a checkpoint of the frozen model of a run or an adapter for other servers; returns its contents.

    Everything is written beside `target` and renamed at the end. One tensor is in memory at a time.

    Args:
        source: folder of a run or an adapter; for parts also a recipe, by name or path.
        target: the new checkpoint's folder, new or empty.
        form: vocabulary: with the prompt sets as special tokens. parts: with none, for vectors that requests bring.
            lora: with low-rank updates beside it, which requests name.
        model: location of the frozen model on this machine, None: as recorded.
        licence: of the prompt sets, None: as the adapter says.
        link: whether files of frozen weights are linked where the file system can.

    Raises UserError where `target` has files, the modules are no prompt sets, a template cannot express how they
    enter, the checkpoint is missing or another one, or the disk is too small.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"'{target}' exists and is not empty; expected a new or empty folder for the checkpoint.")
    export = _planned(source, form, model, licence)
    tables, tokens = export.tables, export.tokens
    frozen = Frozen.of(tables.tensors, tables.replaced)
    dtype = DTYPES[export.run.model.dtype]
    table_bytes = export.size * tables.width * dtype.itemsize
    require_space(target, tables.tensors, frozen, 2 * table_bytes, link)
    temporary = temporary_of(target)
    try:
        temporary.mkdir(parents=True)
        write_settings(export.base, temporary, export.run.conversation, export.run.model, tokens, export.places)
        _write_numbers(export, form, temporary)
        prove(export.run, temporary, tokens)
        tables.write_embedding(temporary / EMBEDDING_FILE, export.vectors, tokens, dtype)
        tables.write_head(temporary / HEAD_FILE, tokens, dtype)
        linked = write_frozen(temporary, tables.tensors, frozen, link)
        added = {tables.embedding: (EMBEDDING_FILE, table_bytes), tables.head: (HEAD_FILE, table_bytes)}
        write_index(temporary, tables.tensors, frozen, added)
        require_fitting_weights(export.run.model.model_copy(update={"path": str(target)}), temporary)
        if form == "lora":
            write_loras(
                temporary / LORAS, export.adapter.meta.method, export.adapter.pool, export.run.family.decoder, dtype
            )
        if form == "vocabulary":
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
        "sets": [] if isinstance(tokens, PartToken) else list(tokens.names),
        "tokens": tokens.count,
        "vocabulary": [tables.rows, export.size],
        "bytes": size,
        "linked_bytes": linked,
    }


def _planned(source: Path, form: Form, model: str | None, licence: str | None) -> Export:
    """Read what is exported and refuse what cannot be; computes nothing."""
    adapter = _adapter(source, form, model, licence)
    if form == "lora":
        require_loras(adapter.meta.method, adapter.pool, source)
        require_no_heads(adapter.meta.method, adapter.pool, source)
    else:
        require_rows(adapter.meta.method, adapter.pool, source, adapter.meta.projector)
    config, pool = adapter.meta.model, adapter.pool
    base = checkpoint(source_of(config)).folder
    tables = tables_of(base)
    length, width = pool.prompts.shape[1:]
    if form != "lora" and len(pool) and width != tables.width:
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
    insertion, first = insertion_of(adapter.meta.method), next_token(processor.tokenizer)
    tokens: SetTokens | PartToken
    if form != "vocabulary":
        tokens = PartToken(first, identity_of_places(adapter.meta.base_model, config, places_of(form, insertion)))
    else:
        tokens = SetTokens(pool.names, length, first, identity_of(pool.names, pool.prompts, DTYPES[config.dtype]))
    run = Run(conversation_of(processor, config), family, config, insertion)
    places = Places.of(run.conversation, family, run.insertion)
    return Export(adapter, run, base, tables, tokens, places)


def _adapter(source: Path, form: Form, model: str | None, licence: str | None) -> Adapter:
    """The adapter of a run or in a folder, with the frozen model where it is on this machine.

    For parts a recipe is enough, whose adapter has no sets.
    """
    if form == "parts" and not source.is_dir():
        return adapter_of_recipe(load_recipe(source), licence, model)
    if not (source / META).is_file():
        return adapter_of_run(source, licence, model)
    adapter = read_adapter(source)
    config = moved(adapter.meta.model, model)
    require_same_models(source, adapter.meta, config, adapter.meta.clip)
    return Adapter(
        adapter.meta.model_copy(update={"model": config, "licence": licence or adapter.meta.licence}), adapter.pool
    )


def insertion_of(options: MethodOptions) -> str:
    """Where the prompt sets of a method stand."""
    return entry_of(make_method(options)).insertion or "after_bos"


def places_of(form: Form, insertion: str) -> str:
    """What an identity has for the place of modules."""
    return "low_rank" if form == "lora" else insertion


def require_no_heads(options: MethodOptions, pool: PromptPool, source: Path) -> None:
    """Raise UserError where answers depend on answer heads, which change scores while an answer is decoded."""
    if has_heads(pool.states) or (not len(pool) and options.keeps_answer_heads):
        raise UserError(
            f"{source} has answer heads (method.answer_head), which weigh every token of an answer, and other servers "
            "decode without them; expected method.answer_head none. `serve --engine own` answers with them."
        )


def require_rows(options: MethodOptions, pool: PromptPool, source: Path, projector: str = "frozen") -> None:
    """Raise UserError where modules are no vectors that stand among the words of a question, whatever it is."""
    method = make_method(options)
    otherwise = "`export` without --as, or with --as adapter, writes them as an adapter."
    if type(entry_of(method)) is not RowsEntry:
        part = "none" if method.part is None else choice_name(method.part)
        raise UserError(
            f"{source} learned modules of the part {part} (method {method.name}), which are no rows of an embedding "
            f"table; expected prompt sets, the part input_rows. {otherwise}"
        )
    if projector_of(pool.shared) or projector == "trained":
        raise UserError(
            f"{source} learned the image projector too (train.projector), and other servers get prompt sets alone; "
            f"expected train.projector frozen. {otherwise}"
        )
    require_no_heads(options, pool, source)
    modules = max(len(pool), 1)
    chosen = method.routing.rule.inference(torch.zeros(1, modules), torch.zeros(1, dtype=torch.long))
    if chosen.weights is not None:
        raise UserError(
            f"The method {method.name} of {source} multiplies prompt sets by weights that depend on the question, "
            f"and an engine gets them as they are; expected one whose sets count alike. {otherwise}"
        )


def _write_numbers(export: Export, form: Form, folder: Path) -> None:
    """Write configuration, generation settings, the list of the sets for a router, and a page for people."""
    run, tokens, meta = export.run, export.tokens, export.adapter.meta
    write_config(export.base, folder, Sizes(export.size, run.model.dtype), run.conversation.processor)
    spare = range(max(export.tables.rows, tokens.end), export.size)
    never = [*range(tokens.first, tokens.end), *spare]
    write_generation(export.base, folder, run.conversation, never, meta.repetition_penalty)
    content: dict[str, Any] = {"format": FORMAT, "identity": tokens.identity, "insertion": run.insertion}
    if form == "lora":
        content |= {"folder": LORAS, "loras": served_names(export.adapter.pool)}
        text = page_of_loras(meta)
    elif isinstance(tokens, PartToken):
        content |= {"argument": VECTORS, "placeholder": {PLACEHOLDER: tokens.first}}
        text = page_of_parts(meta)
    else:
        sets = {name: tokens.ids(name) for name in tokens.names}
        content |= {"argument": ARGUMENT, "length": tokens.length, "sets": sets, "adapter": ADAPTER}
        text = page_of_sets(meta, tokens)
    write_json(folder / ROUTER, content)
    (folder / "README.md").write_text(text, encoding="utf-8")
