"""Reads and writes the folder of an adapter, with checksums."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.adapter.card import card
from pipeline.adapter.fitted_routing import FITTED, use_fitted, write_fitted
from pipeline.adapter.meta import CARD, FORMAT_VERSION, META, PROJECTOR, READ_VERSIONS, TENSORS, Meta
from pipeline.backbones.lmm import DTYPES
from pipeline.config.method import choice_name, of_a_record, require_registered
from pipeline.errors import UserError
from pipeline.files.atomic import replacing, sha256, write_json
from pipeline.methods import make_method
from pipeline.prompts.answer_head import sound_head
from pipeline.prompts.parts.base import kind_of
from pipeline.prompts.parts.projector import projector_of, shared_projector
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routers.kept_keys import sound


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory."""

    meta: Meta
    pool: PromptPool


def write_adapter(adapter: Adapter, target: Path) -> dict[str, Any]:
    """Write an adapter into a folder that is new, empty or an adapter's, and return its contents.

    `prompts.safetensors` holds the modules' tensors [T, ...] in the model's precision and the router's states,
    `routing.safetensors` what the router has made of many tasks together, `adapter.json` the models they belong to and
    how modules are selected, `README.md` the model card, and
    `projector.safetensors` the image projector where it is trained.
    """
    refuse_foreign(target)
    pool, dtype = adapter.pool, DTYPES[adapter.meta.model.dtype]
    with replacing(target / TENSORS) as temporary:
        pool.save(temporary, dtype)
    (target / PROJECTOR).unlink(missing_ok=True)
    projector = projector_of(pool.shared)
    if projector:
        with replacing(target / PROJECTOR) as temporary:
            save_file({k: v.to(dtype).contiguous() for k, v in projector.items()}, temporary)
    sums = {"sha256": sha256(target / TENSORS)}
    sums["projector_sha256"] = sha256(target / PROJECTOR) if projector else ""
    fitted = target / FITTED
    has_fit = write_fitted(make_method(adapter.meta.method).routing, pool, sums["sha256"], fitted)
    sums["routing_sha256"] = sha256(fitted) if has_fit else ""
    meta = adapter.meta.model_copy(update={"sets": pool.names, **sums})
    write_json(target / META, meta.model_dump(mode="json"))
    with replacing(target / CARD) as temporary:
        temporary.write_text(card(meta, tuple(pool.prompts.shape)), encoding="utf-8")
    size = sum(path.stat().st_size for path in target.iterdir())
    return {"adapter": str(target), "sets": pool.names, "bytes": size}


def read_adapter(folder: Path, own: bool = False) -> Adapter:
    """Read an adapter's folder; UserError when it is not an adapter, damaged, or of another format.

    `own`: this process has written it from a run, whose recipe may name targets.
    """
    try:
        content = json.loads((folder / META).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"'{folder}' has no {META}; expected the folder of an adapter, which `python -m pipeline export` writes."
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / META} is not JSON ({error}); export the run again.") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found not in READ_VERSIONS:
        newer = isinstance(found, int) and found > FORMAT_VERSION
        advice = "it was written by a newer version, which is needed to read it" if newer else "export the run again"
        expected = " or ".join(map(str, READ_VERSIONS))
        raise UserError(f"{folder} has adapter format {found}, expected {expected}; {advice}.")
    if not own:
        require_registered(folder / META, content.get("method"))
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
        if meta.projector == "trained":
            pool.shared |= shared_projector(load_file(folder / PROJECTOR))
    except (SafetensorError, OSError, ValueError, IndexError) as error:  # the latter two: names of other tensors
        raise UserError(f"the tensors of {folder} cannot be read ({error}); export the run again.") from None
    if pool.names != meta.sets or not pool.tensors or any(len(v) != len(pool) for v in pool.tensors.values()):
        raise UserError(f"{folder / TENSORS} does not hold the sets that {META} names; export the run again.")
    _require_part(folder / TENSORS, meta, pool)
    for name, state in zip(pool.names, pool.states, strict=True):
        if not sound(state):
            raise UserError(
                f"{folder / TENSORS}: what the set '{name}' keeps for routing is not finite or not of one shape; "
                "get the adapter again, or export the run again."
            )
        if not sound_head(state):
            raise UserError(
                f"{folder / TENSORS}: the tensors of the answer head of '{name}' are not those of one head; get the "
                "adapter again, or export the run again."
            )
    if meta.routing_sha256:
        _use_fit(folder / FITTED, meta, pool)
    return Adapter(meta, pool)


def _require_part(path: Path, meta: Meta, pool: PromptPool) -> None:
    """Raise UserError where the tensors are not those of the part that the method learns, and would go unused."""
    method = make_method(meta.method)
    kind, part = kind_of(method), method.part
    foreign = [name for name in pool.tensors if part is None or not kind.keeps(name)]
    if foreign:
        why = "which learns nothing" if part is None else f"whose part {choice_name(part)} has no such tensor"
        raise UserError(
            f"{path} holds '{foreign[0]}', and {META} names the method {method.name}, {why}; get the adapter again, or "
            "export the run again."
        )


def _use_fit(path: Path, meta: Meta, pool: PromptPool) -> None:
    """Use the kept fit of an adapter's routing; UserError where the file is not the one that was written."""
    if not path.is_file() or sha256(path) != meta.routing_sha256:
        raise UserError(f"{path} is missing or not the file that {META} describes; export the run again.")
    use_fitted(make_method(meta.method).routing, pool, meta.sha256, path)


def refuse_foreign(target: Path) -> None:
    """Raise UserError unless the folder is new, empty or an adapter's."""
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / META).is_file())):
        raise UserError(f"'{target}' exists and is not an adapter; expected a new or empty folder.")
