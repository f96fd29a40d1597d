"""Describes a run in MLflow: the recipe as parameters, its data as inputs, provenance, a note with the matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.files.passwords import masked
from pipeline.runs import provenance
from pipeline.runs.folder import RunFolder
from pipeline.runs.layout import CONFIG
from pipeline.runs.provenance import dataset_fingerprint
from pipeline.runs.rows import score_rows
from pipeline.tracking.tracker import RunFacts

DIGEST = 36  # characters of a dataset's digest; MLflow's limit
BATCH = 100  # parameters per call of log_batch; MLflow's limit
PARAM_CHARS = 6000  # characters of a parameter or tag; MLflow's limit for parameters


class RunDescription:
    """Writes everything that a run depends on to its run in an MLflow store."""

    def __init__(self, client: Any, facts: RunFacts, run_path: Path) -> None:
        self.client, self.facts, self.run_path = client, facts, run_path

    def write(self, run_id: str, state: Mapping[str, Any], is_new: bool) -> None:
        """Log everything that the run depends on; for a resumed run, its present values.

        These change after `add` or on another machine. MLflow's parameters are immutable, so a changed value is stored
        in the tag `changed.<name>`.
        """
        tags = {f"version.{name}": str(version) for name, version in state.get("versions", {}).items()}
        tags |= provenance.describe(self.facts.prepared, self.facts.tasks)
        tags |= self._changed_params(run_id)
        for name, value in tags.items():
            self.client.set_tag(run_id, name, value[:PARAM_CHARS])
        self._log_inputs(run_id)
        changes = provenance.uncommitted_changes()
        if changes or not is_new:
            self.client.log_text(run_id, changes or "", "uncommitted.diff")
        config = self.run_path / CONFIG
        if config.is_file():
            # As masked text: earlier versions wrote passwords into config.yaml.
            self.client.log_text(run_id, masked(config.read_text("utf-8")), config.name)

    def _log_inputs(self, run_id: str) -> None:
        """Log the prepared data as inputs, without those that an earlier call logged."""
        known = self.client.get_run(run_id).inputs
        logged = {(found.dataset.name, found.dataset.digest) for found in (known.dataset_inputs if known else [])}
        inputs = dataset_inputs(self.facts.prepared, self.facts.tasks)
        new = [found for found in inputs if (found.dataset.name, found.dataset.digest) not in logged]
        if new:
            self.client.log_inputs(run_id, datasets=new)

    def _settings(self) -> dict[str, str]:
        """The recipe as parameters, without the password in `tracking.uri`."""
        settings = flatten(self.facts.settings)
        return {key: masked(value)[:PARAM_CHARS] for key, value in settings.items()}

    def _changed_params(self, run_id: str) -> dict[str, str]:
        """Log the recipe's parameters that the run lacks; returns tags for those that have another value there."""
        logged = self.client.get_run(run_id).data
        values = self._settings()
        send_params(self.client, run_id, {key: value for key, value in values.items() if key not in logged.params})
        tags = {f"changed.{key}": value for key, value in values.items() if logged.params.get(key, value) != value}
        for name in logged.tags:
            if name.startswith("changed.") and name not in tags:
                self.client.delete_tag(run_id, name)  # it has its first value again
        return tags


def send_params(client: Any, run_id: str, values: Mapping[str, str]) -> None:
    """Log parameters that a run does not have yet."""
    from mlflow.entities import Param  # here: MLflow takes two seconds to import and only rank 0 needs it

    params = [Param(key, value[:PARAM_CHARS]) for key, value in values.items()]
    for start in range(0, len(params), BATCH):
        client.log_batch(run_id, params=params[start : start + BATCH])


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as texts by dotted names (`a.b.c`), because MLflow's parameters are flat.

    A list of mappings with `name` is keyed by these names; any other list becomes one text.
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
            flat[name] = str(int(value))  # so that 10 and 10.0 are equal
        else:
            flat[name] = "null" if value is None else str(value)
    return flat


def dataset_inputs(prepared: Path, tasks: Sequence[str]) -> list[Any]:
    """The prepared splits that exist as MLflow's dataset inputs, with their fingerprints as digests."""
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
    lines = [
        f"{run.method}: {', '.join(figures)}",
        "",
        f"| {' | '.join(['percent', *run.tasks])} |",
        f"|---|{'---:|' * len(run.tasks)}",
        *(f"| {row.label} | {' | '.join(map(_score, row.scores))} |" for row in score_rows(run)),
    ]
    return "\n".join(lines) + "\n"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}".replace("-", "−")
