"""The tracker that writes to an MLflow store; its interface is in tracker.py."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import EXIT_OK, EXIT_RESUMABLE, Interrupted, UserError
from pipeline.files.passwords import masked
from pipeline.runs.attempts import open_attempt
from pipeline.runs.folder import read_run
from pipeline.runs.layout import MATRIX, REPORT
from pipeline.tracking.description import PARAM_CHARS, RunDescription, flatten, note, send_params
from pipeline.tracking.replaced import AT_ONCE, REPLACED, RESTORED
from pipeline.tracking.store import first_line, logged_model_name, open_store, store_in_use, tracking_uri
from pipeline.tracking.tracker import Register, RunFacts, StoredRun, never
from pipeline.tracking.waiting_metrics import WaitingMetrics

if TYPE_CHECKING:
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

FINISHED = "FINISHED"
RETRY_AFTER_S = 60.0  # pause after a failure of the store, because a failing call may block for seconds
PREDICTIONS = 20  # predictions per task that are uploaded as a sample
NOTE = "mlflow.note.content"  # the tag that MLflow shows as a run's description
SUMMARY = ("zero_shot", "gain", "immediate_gain")  # metrics that are added to those of the last stage at the end


class MlflowTracker:
    """Tracks one sequence in an MLflow store through the client API, without MLflow's global state."""

    def __init__(self, facts: RunFacts, run_path: Path) -> None:
        self.facts = facts
        self.run_path = run_path
        self.uri = tracking_uri(facts.tracking.uri)
        self.client, self.experiment_id = open_store(self.uri, facts.tracking.experiment or facts.name)
        self._description = RunDescription(self.client, facts, run_path)
        self._parent: str | None = None
        self._open: list[str | None] = []  # ids of the open runs, innermost last
        self._stages: dict[str, str] = {}
        self._models: dict[str, str] = {}
        # By id of a stage's run: {"label", "model"} of records to be marked as replaced, or no longer to be.
        self._marks: dict[str, dict[str, dict[str, Any]]] = {REPLACED: {}, RESTORED: {}}
        self._waiting = WaitingMetrics()
        self._stays_finished: Callable[[bool], bool] = never
        self._has_all_numbers = False  # whether an earlier call completed the matrix
        self._left_finished = False  # whether an earlier call finished the parent run and this one has not reopened it
        self._retry_at = 0.0
        self._warned = False

    @contextmanager
    def sequence(self, state: Mapping[str, Any], stays_finished: Callable[[bool], bool] = never) -> Iterator[None]:
        known = state.get("mlflow") or {}
        self._stays_finished, self._has_all_numbers = stays_finished, state.get("status") == "done"
        if known.get("experiment") == self.experiment_id:
            self._stages = dict(known.get("stages", {}))
            self._models = dict(known.get("models", {}))
            self._marks = {name: dict(known.get(name) or {}) for name in (REPLACED, RESTORED)}
        else:
            known = {}
        try:
            run_id, is_new = self._start(known.get("parent"), self.run_path.name, {"kind": "sequence"})
        except Exception as error:
            raise UserError(
                f"MLflow at {masked(self.uri)} refused a new run ({first_line(error)}); mend the store or set "
                "tracking.enabled=false."
            ) from error
        self._parent = self._waiting.parent = run_id
        with self._running(run_id):
            with self._tolerant("describing the run"):
                self._description.write(run_id, state, is_new)
            self._mark(AT_ONCE)
            yield

    @contextmanager
    def stage(self, index: int, name: str) -> Iterator[None]:
        label = f"{index + 1:02d}-{name}"
        run_id = None
        with self._tolerant(f"opening the run of stage {label}"):
            tags = {"kind": "stage", "stage": str(index + 1), "task": name}
            if self._parent is not None:
                tags["mlflow.parentRunId"] = self._parent
                if self._left_finished:
                    self.client.update_run(self._parent, status="RUNNING")
                    self._left_finished = False
            run_id, is_new = self._start(self._stages.get(label), label, tags)
            self._stages[label] = run_id
            if is_new:
                send_params(self.client, run_id, {"stage": str(index + 1), "task": name, "method": self.facts.method})
        with self._running(run_id):
            yield
        self._mark(label)

    def metrics(self, values: Mapping[str, float | None], step: int) -> None:
        run_id = self._current()
        if run_id is None:
            return
        with self._tolerant("collecting metrics"):
            self._waiting.add(run_id, self._entries(values, step))
        if time.monotonic() >= self._retry_at:
            self._flush()

    def params(self, values: Mapping[str, Any]) -> None:
        run_id = self._current()
        if run_id is None:
            return
        with self._tolerant("logging parameters"):
            logged = self.client.get_run(run_id).data.params  # immutable in MLflow, so a restart logs only new ones
            send_params(
                self.client, run_id, {key: value for key, value in flatten(values).items() if key not in logged}
            )

    def artifact(self, path: Path, folder: str | None = None) -> None:
        run_id = self._current()
        if run_id is None:
            return
        with self._tolerant(f"uploading {path.name}"):
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), folder)
            else:
                self.client.log_artifact(run_id, str(path), folder)

    def stage_model(self, folder: Path, name: str, metrics: Mapping[str, float | None]) -> None:
        run_id = self._current()
        if run_id is None or name in self._models:
            return
        from mlflow.entities import LoggedModelOutput

        with self._tolerant(f"registering the prompts of {name}"):
            model = self.client.create_logged_model(
                self.experiment_id,
                name=logged_model_name(name),
                source_run_id=run_id,
                tags={"sequence": self.run_path.name},
                params={"method": self.facts.method, "model": self.facts.model},
                model_type="prompt-set",
            )
            for file in sorted(folder.iterdir()):
                # Without the optimizer state, which is only for resuming this run.
                if file.suffix in {".safetensors", ".json"} and not file.name.startswith("resume"):
                    self.client.log_model_artifact(model.model_id, str(file))
            self.client.finalize_logged_model(model.model_id, "READY")
            self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
            self._models[name] = model.model_id
            self.client.log_batch(run_id, metrics=self._entries(metrics, 0, model.model_id))

    def model_metrics(self, name: str, metrics: Mapping[str, float | None], step: int) -> None:
        model_id, run_id = self._models.get(name), self._current()
        if model_id is None or run_id is None:
            return
        with self._tolerant(f"logging the scores of {name}"):
            self._waiting.add(run_id, self._entries(metrics, step, model_id))
        if time.monotonic() >= self._retry_at:
            self._flush()

    def results(self, run_path: Path, register: Register | None = None) -> None:
        run_id = self._current()
        if run_id is None:
            return
        if self._marks[REPLACED] and open_attempt(run_path) is None:  # a call was killed before it marked them
            for label in {entry["label"] for entry in self._marks[REPLACED].values()}:
                self._mark(label)
        for name in (REPORT, MATRIX):
            self.artifact(run_path / name)
        self.artifact(run_path / "figures", "figures")
        run = None
        with self._tolerant("describing the results"):
            run = read_run(run_path)
            numbers = run.metrics()
            if run.last_stage is not None:
                self.metrics({name: numbers.get(name) for name in SUMMARY}, run.last_stage + 1)
            self.client.set_tag(run_id, NOTE, note(run)[:PARAM_CHARS])
        if run is None:
            return
        with self._tolerant("uploading predictions"):
            for task, lines in run.last_predictions().items():
                sample = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines[:PREDICTIONS])
                self.client.log_text(run_id, sample, f"predictions/{task}.jsonl")
        if register is not None:
            with self._tolerant("registering the adapter"), store_in_use(self.uri):
                register(StoredRun(self.client, self.uri, self.experiment_id, run_id))

    def run_ids(self) -> dict[str, Any]:
        return {
            "experiment": self.experiment_id,
            "parent": self._parent,
            "stages": dict(self._stages),
            "models": dict(self._models),
            **{name: dict(waiting) for name, waiting in self._marks.items() if waiting},
        }

    def _mark(self, label: str) -> None:
        """Tag the records of stages that have been replaced by the one with this label, or were taken back."""
        for name, waiting in self._marks.items():
            text = str(name == REPLACED).lower()
            for run_id in [found for found, entry in waiting.items() if entry["label"] == label]:
                model = waiting[run_id]["model"]
                with self._tolerant("marking a stage that was replaced"):
                    self.client.set_tag(run_id, REPLACED, text)
                    if model is not None:
                        self.client.set_logged_model_tags(model, {REPLACED: text})
                    del waiting[run_id]

    def _start(self, run_id: str | None, name: str, tags: dict[str, str]) -> tuple[str, bool]:
        """Continue the run with that id, or create one; returns (run id, whether it is new)."""
        from mlflow.exceptions import MlflowException

        if run_id is not None:
            try:
                run = self.client.get_run(run_id)
                if run.info.lifecycle_stage == "active":
                    self.client.set_tag(run_id, "requeue", str(int(run.data.tags.get("requeue", "0")) + 1))
                    # A finished run keeps its status until a stage is opened, however this process ends.
                    is_parent = tags.get("kind") == "sequence"
                    self._left_finished |= is_parent and run.info.status == FINISHED and self._stays_finished(False)
                    if not (is_parent and self._left_finished):
                        self.client.update_run(run_id, status="RUNNING")
                    return run_id, False
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            logger.warning("MLflow no longer knows the run %s of %s; tracking goes on in a new one.", run_id, name)
        created = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        return str(created.info.run_id), True

    @contextmanager
    def _running(self, run_id: str | None) -> Iterator[None]:
        self._open.append(run_id)
        status = "FAILED"
        try:
            yield
            status = FINISHED
        except (Interrupted, KeyboardInterrupt):
            status = "KILLED"
            raise
        except SystemExit as leaving:
            if leaving.code in (None, EXIT_OK):
                status = FINISHED
            elif leaving.code == EXIT_RESUMABLE:
                status = "KILLED"
            raise
        finally:
            self._open.pop()
            is_parent = run_id is not None and run_id == self._parent
            kept = is_parent and status != FINISHED and self._stays_finished(status == "KILLED")
            if kept and self._has_all_numbers:
                self._waiting.drop()
            elif is_parent:
                self._waiting.release()
            self._flush(at_the_end=is_parent)
            if run_id is not None and not (kept and self._left_finished):
                with self._tolerant("closing a run"):
                    self.client.set_terminated(run_id, FINISHED if kept else status)

    def _entries(self, values: Mapping[str, float | None], step: int, model_id: str | None = None) -> list[Metric]:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        known = {key: float(value) for key, value in values.items() if value is not None}
        return [Metric(key, value, now, step, model_id=model_id) for key, value in known.items()]

    def _flush(self, at_the_end: bool = False) -> None:
        """Send queued metrics; those of a parent with a complete matrix only at the end, as the call may still fail."""
        with self._tolerant("logging metrics"):
            waits = self._has_all_numbers and not at_the_end and self._stays_finished(False)
            self._waiting.send(
                lambda run_id, entries: self.client.log_batch(run_id, metrics=entries), self._parent if waits else None
            )

    def _current(self) -> str | None:
        return self._open[-1] if self._open else None

    @contextmanager
    def _tolerant(self, doing: str) -> Iterator[None]:
        """Turn failures of the store into one warning, because training must not end by them."""
        try:
            yield
        except Exception as error:
            self._retry_at = time.monotonic() + RETRY_AFTER_S
            if not self._warned:
                self._warned = True
                logger.warning(
                    "MLflow at %s failed while %s (%s); training goes on, and %s has all numbers. Further failures of "
                    "the store are not reported.",
                    masked(self.uri),
                    doing,
                    first_line(error),
                    self.run_path,
                )
