"""The result of runs for people: one self-contained HTML page, PNG figures, a table for the terminal."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from pipeline.errors import UserError
from pipeline.figures import cell_colours, course_figure, inline_svg, loss_figure, matrix_figure, routing_figure, save
from pipeline.files import replacing
from pipeline.run_folder import RunFolder, Scores, read_run

__all__ = ["matrix_figure", "terminal_table", "write_report"]

TEMPLATES = Path(__file__).resolve().parent / "templates"
EXAMPLES = 3  # right ones and wrong ones per task on the page
RIGHT = 0.5  # a soft score from here on is shown among the right ones
THUMBNAIL = 128  # pixels of the longer side
METRIC_TEXTS = {
    "last": "mean over the tasks after the last stage",
    "average": "mean over the stages of the mean over the tasks seen (MAA)",
    "immediate": "mean score of each task right after its own stage",
    "forgetting": "best earlier score minus the last one, mean over the earlier tasks; positive = forgotten",
    "forgetting_coin": "own stage's score minus the last one; CoIN's and ModalPrompt's “BWT”, positive = forgotten",
    "backward_transfer": "last score minus own stage's; negative = forgotten",
}
SHORT_TITLES = {"forgetting": "forgot"}  # on the terminal
LONG_NAME = 16
ROUTING_TEXTS = {"accuracy": "image and text keys", "image_only": "image key alone", "text_only": "text key alone"}


def write_report(run_path: Path, others: Iterable[Path] = ()) -> Path:
    """Write report.html and figures/*.png into the run folder, compared with `others`; returns the page's path.

    Works on a run in progress, with what is there. Raises UserError when a folder is missing or is not a run.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    run = read_run(run_path)
    runs = [run, *(read_run(other) for other in others)]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "cell": _cell_style}
    html = environment.get_template("report.html.j2").render(
        run=run,
        facts=_facts(run),
        header=comparison_header(run.tasks),
        comparison=comparison_rows(runs),
        matrix=_matrix_rows(run),
        metrics=[(name, text, run.metrics().get(name)) for name, text in METRIC_TEXTS.items()],
        routing=[(text, run.routing[name]) for name, text in ROUTING_TEXTS.items() if name in run.routing],
        figures=_figures(run, runs),
        examples=examples(run),
    )
    page = run_path / "report.html"
    with replacing(page) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return page


def terminal_table(run_paths: Sequence[Path]) -> Table:
    """Return the comparison of runs: zero-shot and one row per run; tasks, their mean, forgetting, routing in percent.

    Raises UserError when a folder is missing or is not a run.
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
        label = _broken(row["name"]) + (f"\n({row['note']})" if row["note"] else "")
        table.add_row(escape(label), *map(_percent, row["values"]))
    return table


def _broken(name: str) -> str:
    """Put a long run name on two lines, recipe and rest, so that the numbers of six tasks fit on 80 columns."""
    recipe, hyphen, rest = name.partition("-")
    return f"{recipe}{hyphen}\n{rest}" if len(name) > LONG_NAME and rest else name


def comparison_header(tasks: Sequence[str]) -> list[str]:
    """Return the titles of the numbers in `comparison_rows`."""
    return [*tasks, "last", "forgetting", "routing"]


def comparison_rows(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Return name, note and numbers per row: the scores on the first run's tasks, mean, forgetting, routing.

    The frozen model and each task's most frequent answer come first.
    """
    tasks = runs[0].tasks
    rows = []
    frozen = next((run for run in runs if run.zero_shot is not None), None)
    if frozen is not None and frozen.zero_shot is not None:
        scores = _by_task(frozen, frozen.zero_shot, tasks)
        rows.append({"name": "zero-shot", "note": "", "values": [*scores, _mean(scores), None, None]})
    blind = next((run for run in runs if run.majority is not None), None)
    if blind is not None and blind.majority is not None:
        scores = _by_task(blind, blind.majority, tasks)
        rows.append({"name": "majority answer", "note": "", "values": [*scores, _mean(scores), None, None]})
    for run in runs:
        if run.method == "zero_shot" and run.last_stage is None and frozen is not None:
            continue  # it is the row above
        stage = run.last_stage
        unfinished = stage is not None and stage + 1 < len(run.tasks)
        note = (
            "nothing scored yet" if stage is None else f"{stage + 1} of {len(run.tasks)} stages" if unfinished else ""
        )
        metrics = run.metrics()
        values = [*_by_task(run, run.last_scores, tasks), metrics.get("last"), metrics.get("forgetting")]
        rows.append({"name": run.name, "note": note, "values": [*values, _known_mean(run.routing.get("accuracy"))]})
    return rows


def routing_shares(run: RunFolder) -> dict[str, dict[str, dict[str, float]]]:
    """Return how often (percent, last evaluation) each set was the most similar, and was inserted, per true task."""
    names = run.set_names
    nearest: dict[str, dict[str, float]] = {}
    inserted: dict[str, dict[str, float]] = {}
    routes = _learns_prototypes(run.method)
    for task, lines in run.last_predictions().items():
        for line in lines:
            similarity = line.get("similarity") or []
            if routes and 0 < len(similarity) <= len(names):
                best = names[max(range(len(similarity)), key=similarity.__getitem__)]
                _count(nearest, task, best, len(lines))
            for name in line.get("selected") or []:
                _count(inserted, task, str(name), len(lines))
    tables = {"most similar set (% of samples)": nearest, "inserted sets (% of samples)": inserted}
    return {title: table for title, table in tables.items() if table}


def examples(run: RunFolder) -> list[dict[str, Any]]:
    """Return some right and wrong predictions per task, with question and thumbnail where those are there."""
    shown = []
    for task, lines in run.last_predictions().items():
        right = [line for line in lines if (line.get("score") or 0) >= RIGHT]
        wrong = [line for line in lines if (line.get("score") or 0) < RIGHT]
        chosen = [(line, False) for line in wrong[:EXAMPLES]] + [(line, True) for line in right[:EXAMPLES]]
        samples = _prepared_samples(run, task, [str(line.get("id")) for line, _ in chosen])
        for line, is_right in chosen:
            sample = samples.get(str(line.get("id")))
            shown.append(
                {
                    "task": task,
                    "right": is_right,
                    "id": line.get("id", ""),
                    "question": line.get("question") or (sample.question if sample else ""),
                    "answer": line.get("answer", ""),
                    "prediction": line.get("prediction", ""),
                    "selected": ", ".join(map(str, line.get("selected") or [])),
                    "image": _thumbnail(sample.image) if sample and sample.image else None,
                }
            )
    return shown


def _figures(run: RunFolder, runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Save the run's figures as PNG and return them as inline SVG by name."""
    from markupsafe import Markup

    figures = {}
    if run.last_stage is not None or run.zero_shot is not None:
        matrix = {"tasks": run.tasks, "accuracy": run.accuracy, "zero_shot": run.zero_shot}
        save(matrix_figure(matrix), run.path / "figures" / "matrix.png")  # the page has it as a table
    curves = run.losses()
    if curves:
        figures["losses"] = (loss_figure(curves), "Loss terms over the steps of each stage")
    shares = routing_shares(run)
    if shares:
        figures["routing"] = (routing_figure(shares, run.tasks), "Prompt sets that the samples of each task got")
    courses = {other.name: other.seen_means() for other in runs if any(m is not None for m in other.seen_means())}
    if courses and len(run.tasks) > 1:
        figures["course"] = (course_figure(courses, run.tasks), "Mean score over the tasks seen after each stage")
    for name, (figure, _) in figures.items():
        save(figure, run.path / "figures" / f"{name}.png")
    drawn = {
        name: Markup(inline_svg(figure, f"figure-{name}", description))
        for name, (figure, description) in figures.items()
    }
    return {"losses": None, "routing": None, "course": None} | drawn


def _matrix_rows(run: RunFolder) -> list[tuple[str, Scores]]:
    rows = [(f"after {task}", row) for task, row in zip(run.tasks, run.accuracy, strict=True)]
    return ([("zero-shot", run.zero_shot)] if run.zero_shot else []) + rows


def _facts(run: RunFolder) -> list[tuple[str, str]]:
    """Return what the head of the page says about the run, leaving out what is not known."""
    config, state = run.config, run.state
    facts = {
        "recipe": state.get("recipe") or config.get("name"),
        "method": run.method,
        "seed": config.get("seed"),
        "status": state.get("status"),
        "model": config.get("model", {}).get("path"),
        "keys": config.get("keys", {}).get("path"),
        "started": state.get("started"),
    }
    for group in ("timing", "versions"):
        entries = state.get(group)
        if isinstance(entries, Mapping):
            facts[group] = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entries.items())
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _prepared_samples(run: RunFolder, task: str, ids: Sequence[str]) -> dict[str, Any]:
    """Return samples by id from the prepared data; nothing when it is not on this machine or is another version."""
    prepared = run.config.get("data", {}).get("prepared")
    if not prepared or not (Path(prepared) / task / "test").is_dir():
        return {}
    from pipeline.data.shards import (
        IndexedShards,
    )  # here: it imports torch, which a page without pictures does not need

    try:
        shards = IndexedShards(Path(prepared) / task / "test")
        places = {name: place for place, name in enumerate(shards.ids)}
        return {name: shards[places[name]] for name in ids if name in places}
    except (UserError, OSError):
        return {}


def _thumbnail(encoded: bytes) -> str | None:
    """Return an image file as a small data URI, None when it cannot be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            small = image.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
    except (OSError, ValueError):
        return None
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _learns_prototypes(method: str) -> bool:
    """Tell whether similarities mean something: without trained prototypes they are those of a random head."""
    from pipeline.methods import METHODS

    return method not in METHODS or METHODS[method].learns_prototypes


def _count(table: dict[str, dict[str, float]], task: str, name: str, samples: int) -> None:
    row = table.setdefault(task, {})
    row[name] = row.get(name, 0.0) + 100.0 / samples


def _by_task(run: RunFolder, scores: Scores, tasks: Sequence[str]) -> Scores:
    """Order a run's scores by the tasks of another one, which may have learned them in another order."""
    known = dict(zip(run.tasks, scores, strict=True))
    return [known.get(task) for task in tasks]


def _mean(scores: Scores) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None


def _known_mean(scores: Scores | None) -> float | None:
    """Mean over the tasks that have a score: the tasks still to come have no routing yet."""
    return _mean([score for score in scores or [] if score is not None])


def _percent(score: float | None) -> str:
    return "–" if score is None else f"{score:.1f}"


def _cell_style(score: float | None) -> str:
    background, ink = cell_colours(score)
    return f"background:{background};color:{ink}"
