"""The report page of a benchmark: accuracies by method and dataset, per seed and per class, and losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from pipeline.clip.benchmark.curves import curves_figure
from pipeline.clip.benchmark.overview import (
    MAIN,
    accuracy_figure,
    groups_of,
    line_interval,
    missing,
    tiles,
)
from pipeline.clip.benchmark.results import UnitResult, results_json, results_table, spread_text
from pipeline.errors import UserError
from pipeline.files.paths import command
from pipeline.report.figures import loss_figure
from pipeline.report.html import write_page
from pipeline.report.look import inline_svg
from pipeline.report.numbers import fixed
from pipeline.report.settings import all_settings, data_rows, main_settings, provenance_facts
from pipeline.runs.contents import BenchmarkState, LogLine, read_json
from pipeline.runs.folder import read_config, read_lines
from pipeline.runs.layout import CONFIG, METRICS, RESULTS, STATE, unit_folder

PANELS = 12  # of the figure of losses; a benchmark may have hundreds of units
HEADINGS = {
    "accuracy": ("h-accuracy", "Accuracy"),
    "seeds": ("h-seeds", "Every seed"),
    "classes": ("h-classes", "By class"),
    "losses": ("h-losses", "Losses"),
    "settings": ("h-settings", "Settings"),
}


def read_results(run: Path) -> dict[str, Any]:
    """The content of a run's results.json; UserError when it is missing or damaged."""
    path = run / RESULTS
    if not path.is_file():
        raise UserError(f"{run} has no {RESULTS} yet; evaluate it first with `{command('evaluate', run)}`.")
    try:
        found = json.loads(path.read_text("utf-8"))
        # Recompute the means from the counts, which finds values that are no numbers.
        return results_json(str(found["protocol"]), [UnitResult.from_json(unit) for unit in found["units"]])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); evaluate the run again.") from None


def write_benchmark_report(run: Path) -> Path:
    """Write report.html into the run folder and return its path; works on a run in progress.

    Raises UserError where there are no results yet, or they are damaged.
    """
    content, state, config = read_results(run), _state(run), _config(run)
    classes, losses, curves = _by_class(content), _losses(run, content), _curves(content)
    page = {
        "name": run.resolve().name,
        "contents": [("top", "Summary"), *(HEADINGS[part] for part in HEADINGS if part != "losses" or losses)],
        "state": state,
        "content": content,
        "tiles": tiles(content, state),
        "facts": _facts(state, config, content),
        "missing": missing(content, state, run),
        "figure": _drawn(accuracy_figure(content), "accuracies", "Accuracy of every method by dataset, with intervals"),
        "groups": groups_of(content["lines"]),
        "intervals": [
            {group: line_interval(content, line, group) for group in line["groups"]} for line in content["lines"]
        ],
        "targets": any(line.get("target_mean") for line in content["lines"]),
        "classes": classes,
        "losses": losses,
        "loss_figure": _drawn(_loss_figure(run, losses), "losses-by-unit", "Loss of the units over their steps"),
        "curves": curves,
        "rounds": any(line.get("paid") for line in content["lines"]),
        "settings": main_settings(config, MAIN),
        "all_settings": all_settings(config),
        "data": data_rows(state),
        "provenance": provenance_facts(state),
    }
    return write_page(run, "clip_report.html.j2", {"mean": spread_text, "number": _number}, page)


def terminal_results(run: Path) -> Any:
    """The table of a run for the terminal."""
    return results_table(run.resolve().name, read_results(run))


def _state(run: Path) -> dict[str, Any]:
    return read_json(run / STATE, BenchmarkState)


def _config(run: Path) -> dict[str, Any]:
    """The content of a run's config.yaml; {} where there is none. UserError when it is damaged."""
    return read_config(run / CONFIG)


def _facts(state: dict[str, Any], config: dict[str, Any], content: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands below the name of a benchmark, without unknown facts."""
    facts = {
        "recipe": state.get("recipe") or config.get("name"),
        "protocol": content["protocol"],
        "model": (config.get("model") or {}).get("path"),
        "seeds": ", ".join(str(seed) for seed in state.get("seeds") or []),
        "status": state.get("status"),
        "started": state.get("started"),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _drawn(figure: Figure | None, name: str, description: str) -> Markup | None:
    return None if figure is None else Markup(inline_svg(figure, name, description))


def _curves(content: dict[str, Any]) -> Markup | None:
    """The figure of accuracy over labels; None where no row asked for labels."""
    if not any(line.get("area") for line in content["lines"]):
        return None
    return _drawn(curves_figure(content["lines"]), "curves", "Accuracy over the labels paid, by row")


def _loss_figure(run: Path, losses: list[dict[str, Any]]) -> Figure | None:
    """The losses of the first units over their steps; None where none was trained."""
    shown = [loss["label"] for loss in losses[:PANELS]]
    logs = {label: list(read_lines(unit_folder(run, label) / METRICS, LogLine)) for label in shown}
    return loss_figure(logs) if logs else None


def _by_class(content: dict[str, Any]) -> list[dict[str, Any]]:
    """For each dataset and group: each method's accuracy by class in percent, over all seeds."""
    names: dict[tuple[str, str], list[str]] = {}
    tables: dict[tuple[str, str], dict[str, list[tuple[int, int]]]] = {}
    for unit in content["units"]:
        for group, counts in unit["groups"].items():
            methods = tables.setdefault((unit["dataset"], group), {})
            names[unit["dataset"], group] = counts["names"]
            sums = methods.get(unit["method"], [(0, 0)] * len(counts["total"]))
            pairs = zip(counts["right"], counts["total"], strict=True)
            methods[unit["method"]] = [(a + r, b + t) for (a, b), (r, t) in zip(sums, pairs, strict=True)]
    found = []
    for (dataset, group), methods in tables.items():
        rows = [
            {"name": name, "values": [100 * m[k][0] / m[k][1] if m[k][1] else None for m in methods.values()]}
            for k, name in enumerate(names[dataset, group])
        ]
        found.append({"dataset": dataset, "group": group, "methods": list(methods), "rows": rows})
    return found


def _losses(run: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """First and last logged loss of each trained unit."""
    found = []
    for unit in content["units"]:
        label = f"{unit['method']}-{unit['dataset']}-s{unit['seed']}"
        logged = list(read_lines(unit_folder(run, label) / METRICS, LogLine))
        if logged:
            first, last = logged[0], logged[-1]
            found.append({"label": label, "steps": last["step"], "first": first["loss"], "last": last["loss"]})
    return found


def _number(value: float | None) -> str:
    return "" if value is None else fixed(value, 2)
