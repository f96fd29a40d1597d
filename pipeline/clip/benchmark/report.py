"""The report page of a benchmark: accuracies by method and dataset, per seed and per class, and losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.clip.benchmark.curves import curves_figure
from pipeline.clip.benchmark.results import UnitResult, results_json, results_table, spread_text
from pipeline.errors import UserError
from pipeline.files.paths import command
from pipeline.report.figures import inline_svg
from pipeline.report.html import write_page
from pipeline.runs.contents import BenchmarkState, LogLine, read_json
from pipeline.runs.folder import read_lines
from pipeline.runs.layout import METRICS, RESULTS, STATE, unit_folder


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
    """Write report.html into the run folder and return its path; works on a run in progress."""
    content = read_results(run)
    page = {
        "name": run.resolve().name,
        "state": _state(run),
        "content": content,
        "groups": list(dict.fromkeys(group for line in content["lines"] for group in line["groups"])),
        "targets": any(line.get("target_mean") for line in content["lines"]),
        "classes": _by_class(content),
        "losses": _losses(run, content),
        "curves": _curves(content),
        "rounds": any(line.get("paid") for line in content["lines"]),
    }
    return write_page(run, "clip_report.html.j2", {"spread": spread_text, "number": _number}, page)


def terminal_results(run: Path) -> Any:
    """The table of a run for the terminal."""
    return results_table(run.resolve().name, read_results(run))


def _state(run: Path) -> dict[str, Any]:
    return read_json(run / STATE, BenchmarkState)


def _curves(content: dict[str, Any]) -> Markup | None:
    """The figure of accuracy over labels; None where no row asked for labels."""
    if not any(line.get("area") for line in content["lines"]):
        return None
    return Markup(inline_svg(curves_figure(content["lines"]), "curves", "Accuracy over the labels paid, by row"))


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
    return "" if value is None else f"{value:.2f}"
