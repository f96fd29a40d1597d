"""The summary that a run prints at its end: scores, location of the report, and the next command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.ranks.slurm import next_command
from pipeline.report.listing import narrow
from pipeline.report.numbers import percent
from pipeline.runs.folder import RunFolder, read_run
from pipeline.runs.layout import CONFIG, REPORT
from pipeline.runs.rows import score_rows

NAMED = {"last": "last", "forgetting": "forgetting", "routing": "routing", "routing_loss": "lost to routing"}


def show_end(run_path: Path, verb: str, name: str, wrong: Sequence[str] = ()) -> None:
    """Print the accuracy matrix of a sequence's run, what is wrong, the path of its report and the next command.

    `verb` is the command that was run, `name` its recipe or, for `evaluate`, its run folder, `wrong` lines about tasks.
    """
    run = read_run(run_path)
    if run.last_stage is not None or run.zero_shot is not None:
        Console().print(matrix_table(run))
        print(key_figures(run))
    for line in wrong:
        print(line)
    page = run_path / REPORT
    if page.is_file() and verb != "train":
        print(f"report: {page}")
    print(f"next: {_next(run, run_path, verb, name)}")


def matrix_table(run: RunFolder) -> Table:
    """The scores after every stage as a table for the terminal, in percent."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    table.add_column("", overflow="fold")
    for task in run.tasks:
        table.add_column(escape(task), justify="right", overflow="fold")
    for row in score_rows(run):
        table.add_row(escape(narrow(row.label)), *map(percent, row.scores))
    return table


def key_figures(run: RunFolder) -> str:
    """The key figures in one line, without unknown ones."""
    metrics = run.metrics()
    routing = [share for share in run.routing.get("accuracy", []) if share is not None]
    known = {**metrics, "routing": sum(routing) / len(routing) if routing else None}
    figures = [f"{word} {percent(value)}" for key, word in NAMED.items() if (value := known.get(key)) is not None]
    return "percent" + (f"; {', '.join(figures)}" if figures else "")


def _next(run: RunFolder, run_path: Path, verb: str, name: str) -> str:
    """The command to run next, as a job where there is Slurm."""
    finished = run.last_stage is not None and run.last_stage + 1 == len(run.tasks)
    if verb == "train":
        return next_command("evaluate", run_path)
    if finished or run.learned_nothing:
        return next_command("predict", run_path, "--image", "FILE", "--question", "TEXT")
    return next_command(verb, name) if verb != "evaluate" else next_command("run", run_path / CONFIG)
