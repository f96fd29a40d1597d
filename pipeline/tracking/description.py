"""What a run shows beside its numbers: the recipe as parameters, the data it used, a note with the accuracy matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.runs.folder import RunFolder, Scores
from pipeline.runs.provenance import dataset_fingerprint

DIGEST = 36  # most characters that MLflow takes


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as `a.b.c` -> text, because MLflow's parameters are flat, short and immutable.

    A list of things with a name is keyed by name, any other list becomes one text.
    """
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(v, Mapping) and "name" in v for v in value):
            flat[name] = ", ".join(str(item["name"]) for item in value)
            for item in value:
                rest = {field: setting for field, setting in item.items() if field != "name" and setting is not None}
                flat |= flatten(rest, f"{name}.{item['name']}.")
        elif isinstance(value, list | tuple):
            flat[name] = ", ".join(str(item) for item in value)
        elif isinstance(value, float) and math.isfinite(value) and value == int(value) and abs(value) < 1e15:
            flat[name] = str(int(value))  # 10 and 10.0 are one setting
        else:
            flat[name] = "null" if value is None else str(value)
    return flat


def dataset_inputs(prepared: Path, tasks: Sequence[str]) -> list[Any]:
    """The prepared splits as MLflow's dataset inputs, each by its fingerprint, without those that are not there."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    found = []
    for task in tasks:
        for split, context in (("train", "training"), ("test", "testing")):
            folder = prepared / task / split
            fingerprint = dataset_fingerprint(folder)
            if fingerprint:
                source = f'{{"uri": "{folder.absolute().as_uri()}"}}'
                dataset = Dataset(f"{task}-{split}", fingerprint[:DIGEST], "local", source)
                found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    return found


def note(run: RunFolder) -> str:
    """A description of the run in Markdown: its key figures and the accuracy matrix, in percent."""
    metrics = run.metrics()
    figures = [f"{name} {_score(metrics.get(name))}" for name in ("last", "average", "forgetting", "gain")]
    header = ["after", *run.tasks]
    rows = [("zero-shot", run.zero_shot), *((f"{n + 1:02d}", row) for n, row in enumerate(run.accuracy))]
    lines = [
        f"{run.method}: {', '.join(figures)}",
        "",
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {name} | {' | '.join(_score(value) for value in row)} |" for name, row in rows if row and any_known(row)),
    ]
    return "\n".join(lines) + "\n"


def any_known(row: Scores) -> bool:
    """Whether anything was scored in a row of the matrix."""
    return any(value is not None for value in row)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
