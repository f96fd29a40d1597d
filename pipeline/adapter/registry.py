"""Registers adapters in MLflow's model registry, as models that any MLflow client can load."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.adapter.format import read_adapter
from pipeline.adapter.from_run import export
from pipeline.runs.folder import read_run
from pipeline.runs.provenance import package_versions
from pipeline.tracking.store import against_others, logged_model_name
from pipeline.tracking.tracker import StoredRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)
CODE = Path(__file__).with_name("mlflow_model.py")
NEWEST, BEST = "newest", "best"
CONTENT, TASKS, SCORE = "prompt_sets", "tasks", "last"  # tags of a version
SCORE_DIGITS = 4


@dataclass(frozen=True)
class Version:
    """The identity of a version: the model's name, and the seed, tasks and score of its run.

    `content` is the hash of its prompt sets, which identifies it; `score` is the mean over the tasks after the last
    stage.
    """

    name: str
    seed: int
    content: str
    tasks: Sequence[str]
    score: float | None

    @property
    def tags(self) -> dict[str, str]:
        """The tags of the version in MLflow."""
        score = {} if self.score is None else {SCORE: f"{self.score:.{SCORE_DIGITS}f}"}
        return {CONTENT: self.content, TASKS: ", ".join(self.tasks)[:5000], **score}


def register_run(stored: StoredRun, run_path: Path, name: str, seed: int, always: bool = True) -> None:
    """Register a finished run's adapter, unless the model `name` has a version with the same prompt sets.

    Without `always`, only an adapter that is better than all versions with the same tasks (see `is_better`).
    """
    with tempfile.TemporaryDirectory(prefix="pipeline-adapter-") as folder:
        adapter = Path(folder) / "adapter"
        export(run_path, adapter)
        pool = read_adapter(adapter, own=True).pool
        # A hash of the values, not of the file: the order of a safetensors header may differ.
        content = pool.whole_fingerprint()
        known = stored.client.search_model_versions(f"name = '{name}'")
        if not any(version.tags.get(CONTENT) == content for version in known):
            run = read_run(run_path)
            version = Version(name, seed, content, run.tasks, run.metrics().get(SCORE))
            if not always and not is_better(version, known):
                log.info("%s is not registered: a version of '%s' has a score that is as high.", run_path, name)
                return
            register_adapter(stored.client, stored.experiment, stored.run_id, adapter, version)


def is_better(version: Version, known: Sequence[ModelVersion]) -> bool:
    """Whether a version's score is above those of all known versions with the same tasks; true where there are none."""
    tasks = version.tags[TASKS]
    scores = [float(other.tags[SCORE]) for other in known if other.tags.get(TASKS) == tasks and other.tags.get(SCORE)]
    return not scores or (version.score is not None and round(version.score, SCORE_DIGITS) > max(scores))


def register_adapter(
    client: MlflowClient, experiment: str, run_id: str, adapter: Path, version: Version
) -> tuple[str, str]:
    """Register an adapter's folder as a version; returns (model id, version).

    The aliases `newest` and `seed-N` point to it, `best` to the version with the highest score among those with the
    newest version's tasks. The client's store has to be MLflow's current store (see `store_in_use`).
    """
    from mlflow import pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    model = client.create_logged_model(
        experiment,
        name=logged_model_name(version.name),
        source_run_id=run_id,
        model_type="adapter",
        tags={"seed": str(version.seed)},
    )
    with tempfile.TemporaryDirectory(prefix="pipeline-model-") as folder:
        saved = Path(folder) / "model"
        # MLflow warns that there is no input example and no type hint. The warnings are recorded instead of filtered,
        # because MLflow sets filters of its own while it saves.
        with warnings.catch_warnings(record=True):
            pyfunc.save_model(
                str(saved),
                python_model=str(CODE),
                artifacts={"adapter": str(adapter)},
                signature=_signature(),
                model_config={"model": None, "clip": None, "files": False},
                # Given explicitly: MLflow would otherwise load the model to infer its imports.
                pip_requirements=[f"{package}=={version}" for package, version in package_versions().items()],
            )
        client.log_model_artifacts(model.model_id, str(saved))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    name = version.name
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made: Any = against_others(
        lambda: client.create_model_version(
            name, source=f"models:/{model.model_id}", run_id=run_id, model_id=model.model_id, tags=version.tags
        )
    )
    against_others(lambda: client.set_registered_model_alias(name, f"seed-{version.seed}", made.version))
    against_others(lambda: set_aliases(client, name))
    return model.model_id, str(made.version)


def set_aliases(client: MlflowClient, name: str) -> None:
    """Point `newest` and `best` to the current versions, whichever process registered them."""
    versions = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda found: int(found.version))
    newest = versions[-1]
    # Scores over other tasks are not comparable; versions of earlier releases have no scores.
    comparable = [
        found for found in versions if found.tags.get(TASKS) == newest.tags.get(TASKS) and found.tags.get(SCORE)
    ]
    client.set_registered_model_alias(name, NEWEST, newest.version)
    if comparable:
        best = max(comparable, key=lambda found: (float(found.tags[SCORE]), int(found.version)))
        client.set_registered_model_alias(name, BEST, best.version)


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType

    inputs = Schema(
        [
            ColSpec(DataType.string, "question"),
            ColSpec(AnyType(), "image", required=False),
            ColSpec(DataType.string, "task", required=False),
        ]
    )
    outputs = Schema(
        [
            *(ColSpec(DataType.string, name) for name in ("answer", "selected", "similarity")),
            ColSpec(DataType.string, "probability", required=False),
            ColSpec(DataType.boolean, "unfamiliar", required=False),
        ]
    )
    return ModelSignature(inputs=inputs, outputs=outputs)
