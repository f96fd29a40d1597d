"""The runs in a folder with their key figures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from pipeline.config.kinds import run_kind
from pipeline.config.yaml_file import CONFIG
from pipeline.errors import UserError
from pipeline.files.paths import command
from pipeline.report.numbers import percent
from pipeline.runs.contents import BenchmarkState, read_json
from pipeline.runs.folder import read_run
from pipeline.runs.layout import STATE
from pipeline.runs.state import FINISHED

LONG_NAME = 16  # characters per line of a name, so that the numbers of six tasks fit on 80 columns
RUN_WIDTH = 20  # in the list of runs, which has three numbers
FIGURES = ("last", "average", "forgetting")
BENCHMARK = "benchmark"  # in place of a method


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """Return name, method, status, stages and key figures of every run below `folder`, the latest last.

    A damaged run is listed with its error. Raises UserError when the folder is missing.
    """
    if (folder / CONFIG).is_file():
        raise UserError(f"'{folder}' is a run itself; expected the folder that holds the runs, here '{folder.parent}'.")
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder; expected the one that holds the runs, by default runs.")
    rows = []
    for path in sorted(found.parent for found in folder.glob(f"*/{CONFIG}")):
        row: dict[str, Any] = {"run": path.name, "method": "?", "status": "?", "stages": "", "updated": "", "note": ""}
        try:
            if run_kind(path) == "clip":
                rows.append({**row, **benchmark_figures(path)})
                continue
            run = read_run(path)
        except UserError as error:
            rows.append({**row, "status": "damaged", "note": str(error)})
            continue
        metrics, state = run.metrics(), run.state
        routing = [share for share in run.routing.get("accuracy", []) if share is not None]
        rows.append(
            {
                **row,
                "method": run.method,
                "status": str(state.get("status", "new")),
                "stages": f"{state.get('stage', 0)}/{len(run.set_names)}",
                "updated": str(state.get("updated", ""))[:16].replace("T", " "),
                **{name: metrics.get(name) for name in FIGURES},
                "routing": sum(routing) / len(routing) if routing else None,
            }
        )
    return sorted(rows, key=lambda row: row["updated"])


def finished_sequences(folder: Path) -> list[Path]:
    """The runs below a folder to which a task can be added, the latest last."""
    rows = list_runs(folder)
    return [folder / row["run"] for row in rows if row["method"] != BENCHMARK and row["status"] in FINISHED]


def benchmark_figures(path: Path) -> dict[str, Any]:
    """Return method, status and finished units of a benchmark's run; its accuracies are in its own report.

    Raises UserError when run.json is damaged.
    """
    state = read_json(path / STATE, BenchmarkState)
    units = f"{state.get('units_done', 0)}/{len(state.get('units', []))}"
    updated = str(state.get("updated", ""))[:16].replace("T", " ")
    return {"method": BENCHMARK, "status": state.get("status", "new"), "stages": units, "updated": updated}


def runs_table(rows: list[dict[str, Any]]) -> Table:
    """Return the list as a table for a terminal of 80 columns; long names are folded."""
    table = Table(box=SIMPLE_HEAD, padding=0, caption="percent; forgot: positive = forgotten")
    shown = {"last": "last", "forgetting": "forgot", "routing": "routing"}
    for title in ("run", "method", "status", "stages", *shown.values(), "updated"):
        numeric, named = title in (*shown.values(), "stages"), title in ("run", "method")
        table.add_column(title, justify="right" if numeric else "left", overflow="fold", no_wrap=not named)
    for row in rows:
        numbers = [percent(row.get(name)) for name in shown]
        cells = [
            narrow(row["run"], RUN_WIDTH),
            row["method"],
            row["status"],
            row["stages"],
            *numbers,
            row["updated"].partition(" ")[0],
        ]
        table.add_row(*map(escape, cells))
    return table


def no_runs(folder: Path) -> str:
    """What `ls` says of a folder without runs: how the first one comes about."""
    nano = f"`{command('prepare', 'nano')}` and then `{command('run', 'nano')}` make one in some minutes on a CPU"
    return (
        f"There is no run in {folder} yet. {nano}, by the recipe that ships with its model; of your own pictures "
        f"`{command('new-task')}` makes a task first."
    )


def narrow(name: str, width: int = LONG_NAME) -> str:
    """Break a name into lines of at most `width` characters, after its hyphens, underscores and spaces.

    rich would break it in the middle of a word where a column is too narrow.
    """
    lines = [""]
    for part in re.findall(r"[^-_ ]+[-_ ]?|[-_ ]", name):
        if lines[-1] and len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip(" ") for line in lines)
