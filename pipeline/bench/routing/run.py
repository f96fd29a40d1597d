"""`bench routing`: routers side by side, on the probe or on prepared tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from pipeline.bench import measure
from pipeline.bench.routing.ceiling import ceiling
from pipeline.bench.routing.compare import Asked, compare
from pipeline.bench.routing.prepared import prepared_keys
from pipeline.bench.routing.probe import Amounts, TaskKeys, probe_keys
from pipeline.bench.routing.tasks import HARD, MOST, probe_tasks
from pipeline.config import registry
from pipeline.config.method import Choice, choice_name, method_options
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.prompts.routers import make_router

STANDS_IN = {"prototype": "mean"}  # the optimum of a router whose state a stage learns, in closed form
PLENTY = Amounts(12_000, test=400, test_pictures=2_000, train_scale=10)  # for the ceiling


def bench_routing(
    tasks: int = len(HARD),
    prepared: Sequence[Path] = (),
    routers: Sequence[str] = (),
    asked: Asked | None = None,
    seed: int = 0,
    amounts: Amounts | None = None,
    with_ceiling: bool = False,
) -> dict[str, Any]:
    """Measure routers on `tasks` tasks of the probe, or on prepared ones.

    Args:
        tasks: size of the probe; without effect on prepared tasks.
        prepared: folders of prepared tasks, several as one sequence.
        routers: names, or mappings in YAML with `name` and options; none: all that are fitted in closed form.
        asked: what routers are asked for; None: with as many sets per sample as the default recipe's method inserts.
        seed: of the probe's pictures and questions.
        amounts: how many pictures and samples the probe has; None: the defaults.
        with_ceiling: also fit a network on many samples of the probe's tasks.
    """
    chosen = chosen_routers(routers)
    method = make_method(method_options())
    default = "" if method.router is None else choice_name(method.router)
    asked = asked or Asked(k=default_k())
    sequence: list[TaskKeys] = []
    more: dict[str, Any] = {"k": asked.k, "keys_per_task": asked.keys_per_task, "machine": measure.machine()}
    if prepared:
        if with_ceiling:
            raise UserError("--ceiling draws more samples of the probe's tasks, so it cannot be given with --prepared.")
        sequence += prepared_keys(prepared)
    else:
        if not 2 <= tasks <= MOST:
            raise UserError(f"--tasks is {tasks}; expected 2 to {MOST}, of which the probe is made.")
        drawn, wanted = probe_tasks(tasks), amounts or Amounts()
        spent = measure.seconds(lambda: sequence.extend(probe_keys(drawn, wanted, seed)))
        more |= {"seed": seed, "keys_s": round(spent, 2)}
        measure.tell(f"keys of {len(sequence)} tasks: {spent:.1f} s")
    found = compare(sequence, chosen, asked)
    if with_ceiling:
        more["ceiling"] = _ceiling(tasks, seed)
    counts = {split: [len(getattr(task, split).text) for task in sequence] for split in ("train", "test")}
    more["samples"] = {split: {"least": min(n), "most": max(n), "all": sum(n)} for split, n in counts.items()}
    return {"tasks": len(sequence), "default": STANDS_IN.get(default, default), "routers": found, **more}


def amounts_of(pictures: int, samples: int) -> Amounts:
    """The probe with so many training pictures of each family and test samples of each task."""
    return Amounts(pictures, samples, test_pictures=max(100, pictures // 2))


def default_k() -> int:
    """The sets that the default recipe's method inserts for a sample."""
    return int(getattr(method_options(), "k", 1))


def chosen_routers(given: Sequence[str]) -> dict[str, Choice]:
    """The routers to compare, by the names of their rows; UserError for one that cannot be fitted from keys alone."""
    if not given:
        every = registry.names("routers")
        return {name: name for name in every if not registry.load("routers", name).learned}
    chosen: dict[str, Choice] = {}
    for text in given:
        choice = _read(text)
        if make_router(choice).learned:
            stand_in = STANDS_IN.get(choice_name(choice))
            raise UserError(
                f"The router {choice_name(choice)} is learned with a stage's module, so keys alone do not give it."
                + (f" Name {stand_in}, which is its optimum in closed form." if stand_in else "")
            )
        if text in chosen:
            raise UserError(f"The router {text} is named twice; expected each once.")
        chosen[text] = choice
    return chosen


def _read(text: str) -> Choice:
    """A router as a recipe writes it: a name, or `{name: ..., and its options}`."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise UserError(
            f"'{text}' is no router; expected a name, or options as in '{{name: mean, image_weight: 0.3}}'."
        )
    return found


def _ceiling(tasks: int, seed: int) -> dict[str, Any]:
    """What a network recognises that is fitted on many samples of every task: mean, worst, and each task in percent."""
    plenty = [replace(task, train=max(task.train, 400)) for task in probe_tasks(tasks)]
    shares = [round(100 * share, 2) for share in ceiling(probe_keys(plenty, PLENTY, seed)).tolist()]
    return {
        "first": round(sum(shares) / len(shares), 3),
        "worst": min(shares),
        "tasks": {task.name: share for task, share in zip(plenty, shares, strict=True)},
    }


COLUMNS = {
    "first": "first right, %",
    "worst": "worst task, %",
    "lost": "lost against told",
    "within_k": "among the k, %",
    "rank": "mean rank",
    "calibration_error": "calibration error, %",
    "fit_s": "fit, s",
    "score_ms_per_1000": "1,000 samples, ms",
    "bytes_per_task": "bytes per task",
}
UNFAMILIAR = {
    "auroc": "AUROC, %",
    "rejected": "foreign rejected at 1 % of own, %",
    "flagged": "foreign flagged, %",
    "own_flagged": "own flagged, %",
}


def show_routing(result: dict[str, Any], as_json: bool) -> None:
    """Print the routers as tables, or the result as one line of JSON."""
    if as_json:
        print(json.dumps(result), flush=True)
        return
    console = Console(width=160)
    routers = result["routers"]
    table = Table("router", *COLUMNS.values(), "worst task")
    for name, row in routers.items():
        table.add_row(name, *(str(row[column]) for column in COLUMNS), row["worst_task"])
    console.print(table)
    if any("left_out" in row for row in routers.values()):
        unfamiliar = Table("questions of a task left out", *UNFAMILIAR.values())
        for name, row in routers.items():
            unfamiliar.add_row(name, *(str(row["left_out"][column]) for column in UNFAMILIAR))
        console.print(unfamiliar)
    if "ceiling" in result:
        shares = result["ceiling"]
        console.print(f"a network on many samples of each task: {shares['first']} %, worst {shares['worst']} %")
    console.print(f"{result['tasks']} tasks, samples {result['samples']}, k = {result['k']}", highlight=False)
    console.print(f"the default recipe's router: {result['default']}", highlight=False)
    console.print(f"machine: {result['machine']}", highlight=False)
