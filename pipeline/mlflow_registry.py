"""The learned pool in MLflow's model registry, as a model that any MLflow client can load and ask."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.provenance import package_versions

if TYPE_CHECKING:
    from mlflow import MlflowClient

CODE = Path(__file__).with_name("mlflow_pyfunc.py")
NEWEST = "newest"


def register_adapter(
    client: MlflowClient, experiment: str, run_id: str, adapter: Path, name: str, seed: int, content: str
) -> tuple[str, str]:
    """Put an adapter's folder into the registry as a version of model `name`; returns (model id, version).

    `content` is the hash of its prompt sets, by which a version is known again. The aliases `newest` and `seed-N` point
    to it. Works through the client alone, without MLflow's global state.
    """
    from mlflow import pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    model = client.create_logged_model(
        experiment, name=name, source_run_id=run_id, model_type="adapter", tags={"seed": str(seed)}
    )
    with tempfile.TemporaryDirectory(prefix="pipeline-model-") as folder:
        saved = Path(folder) / "model"
        # It would like an example of the input, which holds a picture, and hints that it would take for a schema. Kept
        # and not shown: a filter would be overruled by those that MLflow sets while it saves.
        with warnings.catch_warnings(record=True):
            pyfunc.save_model(
                str(saved),
                python_model=str(CODE),
                artifacts={"adapter": str(adapter)},
                signature=_signature(),
                model_config={"model": None, "clip": None},
                # Said outright: MLflow would otherwise load the model to find out what it imports.
                pip_requirements=[f"{package}=={version}" for package, version in package_versions().items()],
            )
        client.log_model_artifacts(model.model_id, str(saved))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version: Any = client.create_model_version(
        name, source=f"models:/{model.model_id}", run_id=run_id, model_id=model.model_id, tags={"prompt_sets": content}
    )
    for alias in (NEWEST, f"seed-{seed}"):
        client.set_registered_model_alias(name, alias, version.version)
    return model.model_id, str(version.version)


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
    outputs = Schema([ColSpec(DataType.string, name) for name in ("answer", "selected", "similarity")])
    return ModelSignature(inputs=inputs, outputs=outputs)
