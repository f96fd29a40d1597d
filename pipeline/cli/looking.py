"""The verbs that show runs: `report`, `ls` and `ui`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli import completion
from pipeline.cli.lazy import lazy
from pipeline.cli.options import AsJson
from pipeline.cli.outcome import show
from pipeline.config.kinds import one_kind
from pipeline.errors import require_extras
from pipeline.files.paths import RUNS

if TYPE_CHECKING:
    from pipeline.clip.benchmark import report as clip_report
    from pipeline.report import listing
    from pipeline.report import page as run_report
    from pipeline.runs import folder as folders
    from pipeline.sequence import verdict
    from pipeline.ui import server
else:
    clip_report, listing = lazy("pipeline.clip.benchmark.report"), lazy("pipeline.report.listing")
    run_report, server = lazy("pipeline.report.page"), lazy("pipeline.ui.server")
    folders, verdict = lazy("pipeline.runs.folder"), lazy("pipeline.sequence.verdict")


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="The run to report, then others to compare.", autocompletion=completion.runs
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Write RUN/report.html, compared with the other runs, and print the table."""
    if one_kind(runs) == "clip":
        page = clip_report.write_benchmark_report(runs[0])
        tables = [clip_report.terminal_results(run) for run in runs]
        result = {"report": str(page), "results": {str(run): clip_report.read_results(run)["lines"] for run in runs}}
    else:
        lines = verdict.lines_of(folders.read_run(runs[0]))
        page = run_report.write_report(runs[0], runs[1:], lines)
        tables = [run_report.terminal_table(runs)]
        result = {"report": str(page), "verdict": lines, **run_report.comparison(runs)}
    for table in tables:
        Console().print(table)
    show(result, as_json)


def ls(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that holds the runs.")] = RUNS,
    as_json: AsJson = False,
) -> None:
    """List the runs with their key figures."""
    rows = listing.list_runs(folder) if folder.exists() or folder != RUNS else []  # a fresh clone has no such folder
    if rows:
        Console().print(listing.runs_table(rows))
    else:
        typer.echo(listing.no_runs(folder))
    for row in rows:
        if row["note"]:
            typer.echo(f"{row['run']}: {row['note']}")
    if as_json:
        show({"runs": rows}, as_json)


def ui(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="The runs that the page shows.", autocompletion=completion.runs),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0: any free one.")] = 8000,
) -> None:
    """Serve a page on this machine: runs side by side, their answers, a chat about a picture, `add` and `undo`."""
    require_extras("serve", "report", "train")
    server.serve(runs, port)
