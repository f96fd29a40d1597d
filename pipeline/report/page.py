"""The report of a run: a self-contained HTML page, PNG figures, and a comparison table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from pipeline.errors import UserError
from pipeline.report.confusion import confused_pairs, told_rows
from pipeline.report.figures import course_figure, forgetting_figure, loss_figure, matrix_figure, similarity_figure
from pipeline.report.headline import tiles
from pipeline.report.html import write_page
from pipeline.report.listing import narrow
from pipeline.report.look import inline_svg, save
from pipeline.report.missing import missing
from pipeline.report.numbers import percent, spread
from pipeline.report.predictions import examples, routing_shares, similarity_distributions, unfamiliar_shares
from pipeline.report.routing_figure import MOST, routing_figures
from pipeline.report.scores import score_rows
from pipeline.report.settings import all_settings, data_rows, head_facts, main_settings, provenance_facts
from pipeline.report.tables import comparison_header, comparison_rows, cost_rows, metric_rows, seed_rows
from pipeline.runs.folder import RunFolder, Scores, read_run
from pipeline.runs.rows import matrix_rows

__all__ = ["comparison", "matrix_figure", "terminal_table", "write_report"]

SHORT_TITLES = {"forgetting": "forgot"}  # on the terminal
ROUTING_TEXTS = {"accuracy": "image and text keys", "image_only": "image key alone", "text_only": "text key alone"}
HEADINGS = (
    ("h-matrix", "Accuracy matrix"),
    ("h-forgetting", "Forgetting"),
    ("h-metrics", "Metrics"),
    ("h-routing", "Routing"),
    ("h-training", "Training and cost"),
    ("h-examples", "Examples"),
    ("h-settings", "Settings"),
)
FIGURES = ("course", "forgetting", "routing", "inserted", "similarity", "losses")


def write_report(run_path: Path, others: Iterable[Path] = (), verdict: Sequence[str] = ()) -> Path:
    """Write report.html and figures/*.png into the run folder, compared with `others`; returns the page's path.

    The page begins with the lines of `verdict`, which `pipeline.sequence.verdict.lines_of` makes of the run. A run in
    progress is reported as far as it is, with a list of what is missing. Raises UserError when a folder is missing or
    is not a run.
    """
    run = read_run(run_path)
    runs = [run, *(read_run(other) for other in others)]
    shown: dict[str, list[dict[str, Any]]] = {}
    for example in examples(run):
        shown.setdefault(example["task"], []).append(example)
    overview = "Comparison" if runs[1:] else "Overview"
    page = {
        "run": run,
        "contents": [("top", "Summary"), ("h-comparison", overview), *HEADINGS],
        "overview": overview,
        "verdict": verdict,
        "tiles": tiles(run, runs),
        "facts": head_facts(run),
        "missing": missing(run),
        "header": comparison_header(run.tasks),
        "comparison": comparison_rows(runs),
        "seeds": seed_rows(runs),
        "matrix": [(row.label, row.scores, row.kind) for row in matrix_rows(run)],
        "scores": score_rows(run),
        "metric_runs": [other.name for other in runs],
        "metrics": metric_rows(runs),
        "routing": [(text, run.routing[name]) for name, text in ROUTING_TEXTS.items() if name in run.routing],
        "told": told_rows(run),
        "pairs": confused_pairs(run),
        "left_out": len(run.set_names) > MOST,
        "unfamiliar": unfamiliar_shares(run),
        "figures": _figures(run, runs),
        "costs": cost_rows(run),
        "examples": shown,
        "settings": main_settings(run.config),
        "all_settings": all_settings(run.config),
        "data": data_rows(run.state),
        "provenance": provenance_facts(run.state),
    }
    return write_page(run_path, "report.html.j2", {}, page)


def comparison(run_paths: Sequence[Path]) -> dict[str, Any]:
    """Return the data of `terminal_table`: columns, a row per run, means over seeds, and all metrics.

    Scores are in percent, None where missing. Raises UserError when a folder is missing or is not a run.
    """
    runs = [read_run(path) for path in run_paths]
    columns = comparison_header(runs[0].tasks)
    rows = [
        {"name": row["name"], "note": row["note"], "values": dict(zip(columns, row["values"], strict=True))}
        for row in comparison_rows(runs)
    ]
    seeds = [
        {
            "name": row["name"],
            "seeds": row["seeds"],
            "mean": {name: value and value[0] for name, value in zip(columns, row["values"], strict=True)},
            "deviation": {name: value and value[1] for name, value in zip(columns, row["values"], strict=True)},
        }
        for row in seed_rows(runs)
    ]
    return {"columns": columns, "rows": rows, "seeds": seeds, "metrics": {run.name: run.metrics() for run in runs}}


def terminal_table(run_paths: Sequence[Path]) -> Table:
    """Return the comparison of runs as a table: majority answer, zero-shot, and one row per run.

    Columns: tasks, their mean, forgetting, routing, in percent. Raises UserError when a folder is missing or is no run.
    """
    runs = [read_run(path) for path in run_paths]
    if not runs:
        raise UserError("There is no run to compare; expected at least one run folder.")
    table = Table(
        box=SIMPLE_HEAD,
        padding=0,
        caption="percent; last: mean of the tasks seen; forgot: positive = forgotten",
    )
    table.add_column("run", overflow="fold")
    for title in comparison_header(runs[0].tasks):
        table.add_column(escape(SHORT_TITLES.get(title, title)), justify="right", no_wrap=True)
    for row in comparison_rows(runs):
        label = narrow(row["name"]) + (f"\n({row['note']})" if row["note"] else "")
        table.add_row(escape(label), *map(percent, row["values"]))
    for row in seed_rows(runs):
        table.add_row(escape(f"mean of {row['name']}\n± over seeds {row['seeds']}"), *map(_stacked, row["values"]))
    return table


def _figures(run: RunFolder, runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Save the run's figures as PNG and return them as inline SVG by name, None where there is no data."""
    from markupsafe import Markup

    figures = {}
    if run.last_stage is not None or run.zero_shot is not None:
        matrix = {name: getattr(run, name) for name in ("tasks", "accuracy", "zero_shot", "majority")}
        save(matrix_figure(matrix), run.path / "figures" / "matrix.png")  # the page shows it as a table
    courses = {other.name: other.seen_means() for other in runs if any(m is not None for m in other.seen_means())}
    if courses and len(run.tasks) > 1:
        figures["course"] = (course_figure(courses, run.tasks), "Mean score over the tasks seen after each stage")
        columns = {other.name: _columns(other) for other in runs if other.name in courses}
        figures["forgetting"] = (
            forgetting_figure(columns, run.tasks, run.zero_shot),
            "Score on each task after its own and every later stage",
        )
    shares = routing_shares(run)
    if shares:
        for name, figure in zip(("routing", "inserted"), routing_figures(shares, run.tasks), strict=False):
            figures[name] = (figure, "Prompt sets that the samples of each task got")
    similarities = similarity_distributions(run)
    if similarities:
        figures["similarity"] = (
            similarity_figure(similarities),
            "Similarity of each task's samples to their own prompt set and to the most similar other one",
        )
    curves = run.losses()
    if curves:
        figures["losses"] = (loss_figure(curves), "Loss terms over the steps of each stage")
    for name, (figure, _) in figures.items():
        save(figure, run.path / "figures" / f"{name}.png")
    drawn = {
        name: Markup(inline_svg(figure, f"figure-{name}", description))
        for name, (figure, description) in figures.items()
    }
    return dict.fromkeys(FIGURES) | drawn


def _columns(run: RunFolder) -> dict[str, Scores]:
    """Task -> its scores after each stage, None before its own."""
    return {task: [row[place] for row in run.accuracy] for place, task in enumerate(run.tasks)}


def _stacked(value: tuple[float, float] | None) -> str:
    return spread(value).replace(" ±", "\n±")
