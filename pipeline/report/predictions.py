"""Statistics of a run's predictions: routing, similarities, and examples with thumbnails."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipeline.config.method import method_options, of_a_record
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.metrics.boxes import true_box
from pipeline.report.boxes import METRICS, frames, metric_of, unit_of
from pipeline.runs.folder import RunFolder

if TYPE_CHECKING:
    from pipeline.data.sample import Sample

EXAMPLES = 3  # correct ones and wrong ones per task on the page
RIGHT = 0.5  # soft scores from this value on are shown as correct
THUMBNAIL, BOXED = 128, 224  # pixels of the longer side; of pictures on which boxes are drawn
NEAREST, INSERTED = "most similar set (% of samples)", "inserted sets (% of samples)"
OWN, OTHER = "the task's own set", "most similar other set"


def routing_shares(run: RunFolder) -> dict[str, dict[str, dict[str, float]]]:
    """Return per true task how often, in percent of the last evaluation, each set was most similar, and inserted."""
    names = run.set_names
    nearest: dict[str, dict[str, float]] = {}
    inserted: dict[str, dict[str, float]] = {}
    routed = routes(run)
    for task, lines in run.last_predictions().items():
        for line in lines:
            similarity = line.get("similarity") or []
            if routed and 0 < len(similarity) <= len(names):
                best = names[max(range(len(similarity)), key=similarity.__getitem__)]
                _count(nearest, task, best, len(lines))
            for name in line.get("selected") or []:
                _count(inserted, task, str(name), len(lines))
    tables = {NEAREST: nearest, INSERTED: inserted}
    return {title: table for title, table in tables.items() if table}


def similarity_distributions(run: RunFolder) -> dict[str, dict[str, list[float]]]:
    """Return, per true task of the last evaluation, its samples' similarities to their own set and the best other one.

    Empty for methods without a router.
    """
    names = run.set_names
    if not routes(run):
        return {}
    found: dict[str, dict[str, list[float]]] = {}
    for task, lines in run.last_predictions().items():
        rows = [line["similarity"] for line in lines if 0 < len(line.get("similarity") or []) <= len(names)]
        if task not in names or not all(names.index(task) < len(row) for row in rows):
            continue
        own = names.index(task)
        table = {OWN: [row[own] for row in rows], OTHER: [max(row[:own] + row[own + 1 :]) for row in rows if row[1:]]}
        if rows:
            found[task] = {label: values for label, values in table.items() if values}
    return found


def unfamiliar_shares(run: RunFolder) -> dict[str, float]:
    """Return how many of each task's samples, in percent of the last evaluation, resembled no task.

    These are false alarms, for a task that was learned is familiar. Tasks without such a record are left out.
    """
    found = {}
    for task, lines in run.last_predictions().items():
        flags = [line["unfamiliar"] for line in lines if line.get("unfamiliar") is not None]
        if flags:
            found[task] = 100.0 * sum(flags) / len(flags)
    return found


def examples(run: RunFolder) -> list[dict[str, Any]]:
    """Return some correct and wrong predictions per task, with question and thumbnail where available."""
    shown = []
    for task, lines in run.last_predictions().items():
        right = [line for line in lines if (line.get("score") or 0) >= RIGHT]
        wrong = [line for line in lines if (line.get("score") or 0) < RIGHT]
        chosen = [(line, False) for line in wrong[:EXAMPLES]] + [(line, True) for line in right[:EXAMPLES]]
        samples = prepared_samples(run, task, [str(line.get("id")) for line, _ in chosen])
        pictures = Pictures(run, task, lines, samples)
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
                    "selected": ", ".join(_with_similarity(run, line)),
                    "unfamiliar": line.get("unfamiliar") is True,
                    **pictures.of(line),
                }
            )
    return shown


class Pictures:
    """Small pictures of a task's samples; where its metric reads answers as boxes, with the boxes to be drawn on them.

    `lines` are all predictions of the task, `samples` those that are shown, by id.
    """

    def __init__(self, run: RunFolder, task: str, lines: Sequence[dict[str, Any]], samples: dict[str, Sample]) -> None:
        self.samples, self.boxed = samples, metric_of(run, task) in METRICS
        side = BOXED if self.boxed else THUMBNAIL
        self._small = {name: thumbnail(one.image, side) for name, one in samples.items() if one.image is not None}
        self._unit: float | None = None
        if self.boxed:
            true = {name: true_box(one.answer, one.meta) for name, one in samples.items()}
            shown = [(box, small[1]) for name, small in self._small.items() if small and (box := true[name])]
            self._unit = unit_of((str(line.get("answer", "")) for line in lines), shown)

    def of(self, line: dict[str, Any]) -> dict[str, Any]:
        """`image`, a data URI or None, and `frames`, the expected and the predicted box."""
        name = str(line.get("id"))
        small = self._small.get(name)
        if small is None:
            return {"image": None, "frames": []}
        sample, said = self.samples[name], str(line.get("prediction", ""))
        drawn = frames(sample.answer, sample.meta, said, small[1], self._unit) if self.boxed else []
        return {"image": small[0], "frames": drawn}


def _with_similarity(run: RunFolder, line: dict[str, Any]) -> list[str]:
    """Names of the inserted sets, with the sample's similarity to each where it is recorded."""
    known = dict(zip(run.set_names, line.get("similarity") or [], strict=False))
    shown = known if routes(run) else {}
    return [f"{name} ({shown[name]:.2f})" if name in shown else str(name) for name in line.get("selected") or []]


def prepared_samples(run: RunFolder, task: str, ids: Sequence[str]) -> dict[str, Sample]:
    """Return samples by id from the prepared data; empty where it is not on this machine or was prepared anew."""
    prepared = run.config.get("data", {}).get("prepared")
    if not prepared or not (Path(prepared) / task / "test").is_dir():
        return {}
    from pipeline.data.shards import IndexedShards  # deferred: imports pyarrow, not needed without prepared data

    try:
        shards = IndexedShards(Path(prepared) / task / "test")
        places = {name: place for place, name in enumerate(shards.ids)}
        return {name: shards[places[name]] for name in ids if name in places}
    except (UserError, OSError):
        return {}


def thumbnail(encoded: bytes, side: int = THUMBNAIL) -> tuple[str, tuple[int, int]] | None:
    """Return an image file as a small data URI with the size of the original; None when it cannot be read."""
    from pipeline.data.pictures import decode_image  # deferred: imports Pillow, not needed without pictures

    try:
        small = decode_image(encoded)
        size = small.size
        small.thumbnail((side, side))
    except Exception:  # Pillow raises many kinds for damaged files
        return None
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"), size


def routes(run: RunFolder) -> bool:
    """Whether the run's method has a router; without one, older runs recorded similarities of a random head.

    True for methods that are not installed, or not with the run's options.
    """
    said = run.config.get("method") or {}
    fields = said if said.get("name") == run.method else {"name": run.method}
    try:
        return make_method(method_options(of_a_record(fields))).router is not None
    except (UserError, ValidationError):
        return True


def _count(table: dict[str, dict[str, float]], task: str, name: str, samples: int) -> None:
    row = table.setdefault(task, {})
    row[name] = row.get(name, 0.0) + 100.0 / samples
