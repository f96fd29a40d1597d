"""Edits adapters without training: merge, prune, and upload to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.adapter.format import Adapter, read_adapter, write_adapter
from pipeline.adapter.meta import META, Meta
from pipeline.backbones.base_model import base_fingerprint
from pipeline.backbones.lmm_processor import own_penalty, source_of
from pipeline.data.key_file import IDENTITY_FIELDS
from pipeline.data.selection import NO_SET
from pipeline.errors import UserError, nearest
from pipeline.hub.snapshots import settings_folder
from pipeline.hub.weights import SCHEME
from pipeline.methods import Method, make_method
from pipeline.prompts.pool import PromptPool


def merge(folders: Sequence[Path], target: Path) -> dict[str, Any]:
    """Write one adapter with the sets of several that were trained separately on the same models.

    No set changes, so an answer changes only where a sample is routed to a set of another adapter. Raises UserError
    when there are fewer than two, when they belong to different models, select differently, or share a name, and where
    the method would use only some of the sets.
    """
    if len(folders) < 2:
        raise UserError(f"found {len(folders)} adapter to merge; expected at least two.")
    adapters = [read_adapter(folder) for folder in folders]
    first = adapters[0]
    for folder, other in zip(folders[1:], adapters[1:], strict=True):
        differing = _differences(first, other)
        if differing:
            raise UserError(
                f"{folder} does not fit {folders[0]}: {'; '.join(differing)}. Merge adapters of the same frozen models "
                "with the same way of selecting sets."
            )
    names = [name for adapter in adapters for name in adapter.meta.sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"{', '.join(twice)} is in more than one of the adapters; expected every set once. Prune it from one."
        )
    _require_used(make_method(first.meta.method), names)
    pool = PromptPool.joined([adapter.pool for adapter in adapters])
    licences = list(dict.fromkeys(adapter.meta.licence for adapter in adapters))
    meta = first.meta.model_copy(
        update={
            "tasks": names,
            "recipe": "+".join(dict.fromkeys(adapter.meta.recipe for adapter in adapters)),
            "max_new_tokens": max(adapter.meta.max_new_tokens for adapter in adapters),
            # Scores of the separate adapters: routing among all sets has not been measured.
            "scores": {name: score for adapter in adapters for name, score in adapter.meta.scores.items()},
            "metrics": {},
            "licence": licences[0] if len(licences) == 1 else None,
        }
    )
    return write_adapter(Adapter(meta, pool), target)


def prune(folder: Path, tasks: Sequence[str], target: Path) -> dict[str, Any]:
    """Write an adapter without the sets of these tasks; the other sets stay as they are.

    Raises UserError for a task that the adapter does not have, or when no set would be left.
    """
    adapter = read_adapter(folder)
    for task in tasks:
        if task not in adapter.meta.sets:
            known = ", ".join(adapter.meta.sets)
            raise UserError(f"{folder} has no set '{task}'; expected one of {known}.{nearest(task, adapter.meta.sets)}")
    kept = [number for number, name in enumerate(adapter.meta.sets) if name not in tasks]
    if not kept:
        raise UserError(f"nothing of {folder} would be left; keep at least one of {', '.join(adapter.meta.sets)}.")
    pool = adapter.pool.picked(kept)
    left = [task for task in adapter.meta.tasks if task not in tasks]
    scores = {name: score for name, score in adapter.meta.scores.items() if name not in tasks}
    meta = adapter.meta.model_copy(update={"tasks": left, "scores": scores, "metrics": {}})
    return write_adapter(Adapter(meta, pool), target)


def push(folder: Path, repository: str, public: bool = False) -> str:
    """Upload an adapter's folder to a repository (user/name) of the Hugging Face Hub and return its address.

    Creates the repository if necessary, private unless `public`. Raises UserError when the upload fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    read_adapter(folder)
    try:
        api = HfApi()
        api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=f"Prompt sets from {META}")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .")
        raise UserError(  # the reason is not put in parentheses, since the Hub's messages contain some
            f"{repository} could not be uploaded to: {reason}. Expected user/name, network access, and a token with "
            "write access, from `hf auth login` or HF_TOKEN."
        ) from error
    return f"https://huggingface.co/{repository}"


def _require_used(method: Method, names: Sequence[str]) -> None:
    """Raise UserError where the method's rule would never choose some of these modules, whatever the question."""
    rule = method.routing.rule
    if rule.compares or rule.needs_task:
        return
    chosen = rule.inference(torch.zeros(1, len(names)), torch.zeros(1, dtype=torch.long)).numbers.flatten().tolist()
    idle = [name for number, name in enumerate(names) if number not in chosen]
    if idle:
        kept = ", ".join(names[number] for number in chosen if number != NO_SET) or "none"
        raise UserError(
            f"the method {method.name} would answer every question with {kept} of the merged sets, and never with "
            f"{', '.join(idle)}; expected adapters of a method that chooses among its modules, such as task_lora."
        )


def _differences(first: Adapter, other: Adapter) -> list[str]:
    """Reasons why two adapters cannot be merged."""
    one, two = first.meta, other.meta
    found = [] if _same_base(one, two) else ["another base model"]
    found += [f"another CLIP ({name})" for name in IDENTITY_FIELDS if one.keys.get(name) != two.keys.get(name)]
    found += _differing("model", one, two, ("dtype", "template", "image_padding", "image_tokens"))
    # All options of the method but those that only training reads.
    own = dict.fromkeys([*type(one.method).model_fields, *type(two.method).model_fields])
    found += _differing("method", one, two, [name for name in own if name not in one.method.training_only()])
    if one.repetition_penalty != two.repetition_penalty and _penalty(one) != _penalty(two):
        found.append(f"repetition_penalty {two.repetition_penalty!r} instead of {one.repetition_penalty!r}")
    if "trained" in (one.projector, two.projector):
        found.append("a trained projector, which belongs to one pool only")
    if first.pool.shared_fingerprint() != other.pool.shared_fingerprint():
        found.append("modules that have other tensors in common, which belong to one pool only")
    return found


def _penalty(meta: Meta) -> float:
    """The repetition penalty as a number; UserError where it is the checkpoint's and that is unavailable."""
    if isinstance(meta.repetition_penalty, str):
        return own_penalty(settings_folder(source_of(meta.model)))
    return meta.repetition_penalty


def _same_base(one: Meta, two: Meta) -> bool:
    """Whether two adapters belong to one base model; fingerprints of different schemes are compared to the model's."""
    if one.base_model == two.base_model or one.base_model.startswith(SCHEME) == two.base_model.startswith(SCHEME):
        return one.base_model == two.base_model
    return all(base_fingerprint(one.model, meta.base_model) == meta.base_model for meta in (one, two))


def _differing(section: str, one: Meta, two: Meta, fields: Sequence[str]) -> list[str]:
    left, right = getattr(one, section), getattr(two, section)
    values = [(name, getattr(left, name, None), getattr(right, name, None)) for name in fields]
    return [f"{section}.{name} {other!r} instead of {value!r}" for name, value, other in values if value != other]
