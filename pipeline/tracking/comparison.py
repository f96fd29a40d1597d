"""The run of a comparison in MLflow, above the runs that it compares."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.base import TrackingConfig
from pipeline.files.atomic import write_json
from pipeline.files.passwords import masked
from pipeline.runs.state import read_state
from pipeline.tracking.description import PARAM_CHARS, send_params
from pipeline.tracking.store import first_line, open_store, tracking_uri

log = logging.getLogger(__name__)
IDS = "mlflow.json"  # in the comparison's folder: the ids of its run and experiment
PARENT = "mlflow.parentRunId"  # the tag by which MLflow's page shows a run below another


class ComparisonRun:
    """One parent run for a comparison; compared runs are put below it once they have begun.

    A store that fails later is one warning, because the results are in the runs' folders.
    """

    def __init__(self, client: Any, uri: str, experiment: str, run_id: str) -> None:
        self.client, self.uri, self.experiment, self.run_id = client, uri, experiment, run_id
        self._warned = False

    @classmethod
    def opened(cls, tracking: TrackingConfig, experiment: str, name: str, folder: Path) -> ComparisonRun | None:
        """The comparison's run, continued where its folder names one; None where tracking is off.

        Raises UserError when the store cannot be reached.
        """
        if not tracking.enabled:
            return None
        uri = tracking_uri(tracking.uri)
        client, experiment_id = open_store(uri, tracking.experiment or experiment)
        known = _known(folder / IDS, client, experiment_id)
        if known is None:
            created = client.create_run(experiment_id, run_name=name, tags={"kind": "comparison"})
            known = str(created.info.run_id)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / IDS, {"experiment": experiment_id, "run": known})
        return cls(client, uri, experiment_id, known)

    def adopt(self, run: Path) -> None:
        """Put a compared run, by its run.json, below the comparison."""
        ids = read_state(run).get("mlflow") or {}
        if ids.get("experiment") == self.experiment and ids.get("parent"):
            with self._tolerant(f"putting {run} below the comparison"):
                self.client.set_tag(ids["parent"], PARENT, self.run_id)

    def results(self, numbers: Mapping[str, float | None], facts: Mapping[str, str], files: Sequence[Path]) -> None:
        """Send the comparison's numbers, what it was made of, and its files; those of an earlier call are replaced."""
        with self._tolerant("sending the comparison"):
            for name, value in numbers.items():
                if value is not None:
                    self.client.log_metric(self.run_id, name, value)
            logged = self.client.get_run(self.run_id).data.params
            send_params(self.client, self.run_id, {key: text for key, text in facts.items() if key not in logged})
            for name, text in facts.items():  # parameters of a run cannot change
                if logged.get(name, text) != text:
                    self.client.set_tag(self.run_id, f"changed.{name}", text[:PARAM_CHARS])
            for path in files:
                if path.is_file():
                    self.client.log_artifact(self.run_id, str(path))

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        with self._tolerant("closing the comparison"):
            self.client.set_terminated(self.run_id, status)

    @contextlib.contextmanager
    def _tolerant(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a store's client raises
            if not self._warned:
                self._warned = True
                log.warning(
                    "MLflow at %s failed while %s (%s); the comparison itself is whole. Further failures of the store "
                    "are not reported.",
                    masked(self.uri),
                    doing,
                    first_line(error),
                )


def _known(path: Path, client: Any, experiment: str) -> str | None:
    """The id of the run that an earlier call made, if the store still has it."""
    with contextlib.suppress(Exception):  # a damaged file, or a run that the store no longer knows: a new one is made
        ids = json.loads(path.read_text("utf-8"))
        if ids["experiment"] == experiment and client.get_run(ids["run"]).info.lifecycle_stage == "active":
            client.update_run(ids["run"], status="RUNNING")
            return str(ids["run"])
    return None
