"""Costs of large data per record, without a large model: checking, preparing, the first step, and resuming."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from pipeline.backbones.clip import key_identity
from pipeline.bench import measure
from pipeline.bench.data_source import counts_of, write_coin, write_prepared
from pipeline.bench.data_watch import MIB, Watched, watch
from pipeline.bench.keys import save_clip
from pipeline.bench.sizes import SIZES
from pipeline.config.paths import PROJECT
from pipeline.errors import UserError

GENERATED = "generated.json"  # in the folder: the sizes that it was generated with
PHASES = Path(__file__).parent / "data_phases.py"
BASELINE_RECORDS = 160  # of the run whose memory is that of model and libraries
LAST_STAGE = 8
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

# What CoIN (958 thousand records) and ten million records in shards have to reach on one machine, whatever is measured.
GOALS: dict[str, tuple[str, float]] = {
    "check, unprepared": ("seconds", 180),
    "prepare, own overhead": ("ms_per_record_and_core", 1.0),
    "run to its first step": ("seconds", 60),
    "memory beside the model": ("gib_per_rank", 3.0),
    "restart in stage 8": ("seconds", 60),
    "open files": ("most", 200),
}
INDEX_GOALS: dict[str, tuple[str, float]] = {
    "run to its first step": ("seconds", 180),
    "memory beside the model": ("gib_per_rank", 4.0),
    "open files": ("most", 200),
}


def bench_data(
    records: int,
    folder: Path | None = None,
    index_only: bool = False,
    key_width: int | None = None,
    against: Path | None = None,
) -> dict[str, Any]:
    """Measure this code, and the code in the folder `against`, on a synthetic CoIN with `records` records.

    The data is kept in `folder` and reused by another call; None: in a temporary folder. `index_only` generates
    indices, keys and one shard per split, to which all shards of the split are links. Every phase is a separate
    process. Raises UserError for a folder with other data, and for an `against` without this project.
    """
    key_width = key_width or (16 if index_only else 768)
    codes = {"this": PROJECT}
    if against is not None:
        if not (against / "pipeline").is_dir():
            raise UserError(f"{against} has no folder pipeline; expected the folder of a version of this project.")
        codes["against"] = against.resolve()
    with ExitStack() as stack:
        root = folder or Path(stack.enter_context(TemporaryDirectory(prefix="bench-data-")))
        root = root.resolve()
        facts = _generate(root, records, key_width, index_only)
        found = {name: _measure(code, root, name, index_only) for name, code in codes.items()}
    variants = {
        (phase if name == "this" else f"{phase} ({name})"): seen.to_json()
        for name, (phases, _) in found.items()
        for phase, seen in phases.items()
    }
    goals = INDEX_GOALS if index_only else GOALS
    result = {
        "records": facts["records"],
        "images": facts["images"],
        "key_width": key_width,
        "index_only": index_only,
        "machine": measure.machine(),
        "variants": variants,
        "goals": {name: _compared(goals[name], found["this"][1][name]) for name in goals},
        "memory_bytes_per_record": {name: round(numbers["bytes_per_record"]) for name, (_, numbers) in found.items()},
    }
    if against is not None:
        ours, theirs = found["this"][1], found["against"][1]
        result["ratios"] = {
            "against": {
                name: {
                    "this": round(ours[name], 3),
                    "against": round(theirs[name], 3),
                    "ratio": round(theirs[name] / max(ours[name], 1e-9), 2),
                }
                for name in (*goals, "bytes_per_record")
            }
        }
    return result


def _compared(goal: tuple[str, float], found: float) -> dict[str, Any]:
    unit, most = goal
    return {"unit": unit, "found": round(found, 3), "goal": most, "met": bool(found <= most)}


def _generate(root: Path, records: int, key_width: int, index_only: bool) -> dict[str, Any]:
    """Write the data and the recipes, unless they exist."""
    wanted = {"asked": records, "key_width": key_width, "index_only": index_only}
    if (root / GENERATED).is_file():
        there = json.loads((root / GENERATED).read_text("utf-8"))
        if any(there.get(name) != value for name, value in wanted.items()):
            raise UserError(f"{root} holds other generated data ({there}); name a new folder, or remove this one.")
        return there
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root} is not empty and was not generated here; name a new or empty folder.")
    root.mkdir(parents=True, exist_ok=True)
    clip = save_clip(root / "clip", replace(SIZES["tiny"], key_width=key_width))
    facts = {**wanted, "records": 0, "images": 0}
    for size in (records, BASELINE_RECORDS):
        part = root / f"data-{size}"
        counts = counts_of(size)
        facts["records"] = max(facts["records"], sum(map(sum, counts.values())))
        if index_only:
            write_prepared(part / "prepared", counts, key_identity(clip), key_width)
        else:
            facts["images"] = max(facts["images"], write_coin(part / "coin", counts))
    (root / GENERATED).write_text(json.dumps(facts), "utf-8")
    return facts


def _recipe(root: Path, size: int, name: str, prepared: Path, prepare_first: bool = False) -> Path:
    """Write the recipe of one size and one code; its paths are absolute, so that it means the same for all code."""
    work = root / f"work-{name}-{size}"
    work.mkdir(exist_ok=True)
    shutil.copy(root / GENERATED, work / GENERATED)
    data = {"source": "coin", "root": str(root / f"data-{size}" / "coin"), "prepared": str(prepared)}
    tasks = [{"name": task, "max_new_tokens": 8} for task in counts_of(size)]
    train = {"steps": 2, "global_batch": 8, "lr_prompt": 0.01, "lr_head": 0.001, "log_every": 1, "processes": 1}
    path = work / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "bench",
                "data": {**data, "tasks": tasks, "workers": 2, "prepare_first": prepare_first},
                "model": {"path": str(PROJECT / "data_prep/nano/checkpoints/llava")},
                "keys": {"path": str(root / "clip")},
                "train": {**train, "deepspeed": "ds_configs/zero0.json"},
                "evaluate": {"zero_shot": False},
                "tracking": {"enabled": False},
                "run_dir": str(work / "run"),
            }
        ),
        "utf-8",
    )
    return path


def _measure(code: Path, root: Path, name: str, index_only: bool) -> tuple[dict[str, Watched], dict[str, float]]:
    """The phases with one version of the code, and what the goals are about."""
    facts = json.loads((root / GENERATED).read_text("utf-8"))
    size, records = facts["asked"], facts["records"]
    phases: dict[str, Watched] = {}
    numbers: dict[str, float] = {}
    env = {**os.environ, "PYTHONPATH": str(code), **ENVIRONMENT}

    def prepared_of(count: int) -> Path:
        return root / f"data-{count}" / "prepared" if index_only else root / f"work-{name}-{count}" / "prepared"

    def verb(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "pipeline", *arguments]

    def phase(which: str, recipe: Path) -> Watched:
        # By path and not as a module: the measured version of the code may lack this benchmark.
        return watch([sys.executable, str(PHASES), which, str(recipe)], recipe.parent, env)

    def to_first_step(recipe: Path, stage: int) -> Watched:
        run = recipe.parent / "run"

        def reached() -> bool:
            logs = run.glob(f"stages/{stage:02d}-*/metrics.jsonl")
            return any(log.stat().st_size for log in logs)

        return watch(verb("run", str(recipe)), recipe.parent, env, reached)

    small, large = (_recipe(root, count, name, prepared_of(count)) for count in (BASELINE_RECORDS, size))
    for recipe in (small, large):
        shutil.rmtree(recipe.parent / "run", ignore_errors=True)
    if not index_only:
        for recipe in (small, large):
            shutil.rmtree(recipe.parent / "prepared", ignore_errors=True)
        # Exit code 2, because nothing is prepared yet.
        phases["check, unprepared"] = watch(verb("check", str(large)), large.parent, env, allowed=(0, 2))
        phase("prepare", small)
        phases["prepare"] = phase("prepare", large)
        own = json.loads(phases["prepare"].output.splitlines()[-1])
        numbers["prepare, own overhead"] = 1000 * own["processor_s"] / own["records"]
        phases["prepare, up to date"] = phase("prepare", large)
    phases["check, prepared"] = watch(verb("check", str(large)), large.parent, env)
    baseline = to_first_step(small, 1)
    phases["run to its first step"] = to_first_step(large, 1)
    if not index_only:
        shutil.rmtree(large.parent / "run")
        phases["seven stages, answers given"] = phase("fill", large)
        phases["restart in stage 8"] = to_first_step(large, LAST_STAGE)
    starts = [phases[title] for title in ("run to its first step", "restart in stage 8") if title in phases]
    beside = max(seen.own_bytes for seen in starts) - baseline.own_bytes
    for title in ("check, unprepared", "run to its first step", "restart in stage 8"):
        if title in phases:
            numbers[title] = phases[title].seconds
    numbers |= {
        "memory beside the model": beside / (1024 * MIB),
        "bytes_per_record": beside / records,
        "open files": max(seen.open_files for seen in phases.values()),
    }
    phases[f"run to its first step, {BASELINE_RECORDS} records"] = baseline
    return phases, numbers
