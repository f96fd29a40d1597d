"""What a run was made of: its settings, the code's commit, and the fingerprints of its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.files.passwords import masked
from pipeline.runs.folder import RunFolder
from pipeline.tracking.description import flatten

# The settings that are compared most often, by their place in config.yaml; a run of an older version may lack some.
MAIN = (
    "model.path",
    "model.dtype",
    "keys.path",
    "method.name",
    "method.prompt_length",
    "method.rank",
    "method.router",
    "method.k",
    "method.gate",
    "method.share",
    "method.selection",
    "method.insertion",
    "train.steps",
    "train.epochs",
    "train.global_batch",
    "train.lr_prompt",
    "train.lr_head",
    "train.schedule",
    "train.weight_decay",
    "train.deepspeed",
    "seed",
)
SHORT = 12  # characters of a fingerprint and of a commit that the page shows

Fact = tuple[str, str]


def main_settings(config: Mapping[str, Any], names: Sequence[str] = MAIN) -> list[Fact]:
    """The settings of these names that a recipe has, without those that are off."""
    flat = all_settings(config)
    known = {name: flat[name] for name in names if flat.get(name, "null") != "null"}
    if "train.steps" in known:
        known.pop("train.epochs", None)  # which the steps replace
    return list(known.items())


def all_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Every setting of config.yaml by its dotted name, without passwords."""
    return {name: masked(value) for name, value in flatten(config).items()}


def data_rows(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per task and split of run.json: samples used, samples prepared, and the first characters of the fingerprint."""
    rows = []
    data = state.get("data")
    for task, splits in data.items() if isinstance(data, Mapping) else ():
        for split, entry in splits.items() if isinstance(splits, Mapping) else ():
            if isinstance(entry, Mapping):
                fingerprint = str(entry.get("fingerprint") or "")
                row = {"task": task, "split": split, "fingerprint": fingerprint[:SHORT]}
                rows.append(row | {name: _count(entry.get(name)) for name in ("used", "samples")})
    return rows


def provenance_facts(state: Mapping[str, Any]) -> list[Fact]:
    """Commit, ranks, times and package versions of run.json, without unknown ones."""
    commit = str(state.get("commit") or "")[:SHORT]
    facts: dict[str, Any] = {
        "commit": f"{commit}, with uncommitted changes" if commit and state.get("uncommitted") else commit,
        "ranks": state.get("world_size"),
        "started": state.get("started"),
        "updated": state.get("updated"),
        "seconds": _listed(state.get("timing")),
        "versions": _listed(state.get("versions")),
    }
    if state.get("skipped"):
        facts["left out"] = f"{len(state['skipped'])} bad records, listed in run.json"
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def head_facts(run: RunFolder) -> list[Fact]:
    """What stands below the name of a run: recipe, method, seed, status, model, and when."""
    config, state = run.config, run.state
    facts = {
        "recipe": state.get("recipe") or config.get("name"),
        "method": run.method,
        "a stage changes of earlier tasks": run.changes_earlier,
        "seed": config.get("seed"),
        "status": state.get("status"),
        "model": (config.get("model") or {}).get("path"),
        "routing keys": (config.get("keys") or {}).get("path"),
        "started": state.get("started"),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _listed(entries: Any) -> str:
    if not isinstance(entries, Mapping):
        return ""
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entries.items())
