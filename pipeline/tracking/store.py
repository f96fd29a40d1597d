"""The MLflow store of a run: opened quietly, its experiment found or made, and put in place of MLflow's global one."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.errors import UserError
from pipeline.files.passwords import is_masked, masked

if TYPE_CHECKING:
    from mlflow import MlflowClient

Result = TypeVar("Result")
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens it as training, not as GenAI
# Two processes that make the same row, or the tables of a new database, at once: one of them gets one of these.
COLLISIONS = ("already exists", "unique constraint", "duplicate", "database is locked", "already_exists")
ATTEMPTS = 6

QUIET_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # database migrations announce themselves line by line otherwise
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # seven, with growing pauses, would stop training for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def logged_model_name(name: str) -> str:
    """A name as MLflow takes it for a logged model: other characters than letters, digits, `-` and `_` become `-`."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)


def open_store(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """Return a client of the store and the id of the experiment, which is made where it is not there.

    Raises UserError for a store that cannot be used and for an experiment that was deleted.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # here: the import takes two seconds, and only rank 0 needs it

    # Alembic configures its own logger from the store's migration scripts.
    logging.getLogger("alembic").setLevel(logging.WARNING)

    def opened() -> tuple[MlflowClient, str]:
        client = MlflowClient(uri)
        return client, _experiment(client, uri, experiment)

    try:
        return against_others(opened)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"The MLflow store {masked(uri)} cannot be used ({first_line(error)}); expected a reachable server or a "
            "writable database. Set tracking.uri or MLFLOW_TRACKING_URI, or tracking.enabled=false."
        ) from error


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return str(client.create_experiment(name, artifact_location=artifact_location(uri), tags=EXPERIMENT_TAGS))
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"The MLflow experiment '{name}' in {masked(uri)} is deleted; expected an active one. Restore it with "
            f"`mlflow experiments restore -x {experiment.experiment_id}` or set tracking.experiment to another."
        )
    return str(experiment.experiment_id)


def against_others(work: Callable[[], Result]) -> Result:
    """Do `work`, again where another process got in between: it then finds what that process has made.

    MLflow looks whether something is there and makes it afterwards, in two transactions.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return work()
        except UserError:
            raise
        except Exception as error:
            if not any(word in str(error).lower() for word in COLLISIONS):
                raise
            # Unequal pauses, for the others retry too; a new database gets its tables within seconds.
            time.sleep(random.uniform(0.1, 0.5) * attempt)
    return work()


@contextlib.contextmanager
def store_in_use(uri: str) -> Iterator[None]:
    """Make `uri` what MLflow itself takes for the tracking store while the block runs, and put back what it was.

    The registry of a database, and saving a model, ask a client of their own, without an address, for the logged model:
    elsewhere than in the run's store it is not found, and a `mlflow.db` appears in the working folder.
    """
    from mlflow.tracking._tracking_service import utils

    kept = {name: os.environ.get(name) for name in (STORE_VARIABLE,)}
    before = utils._tracking_uri
    try:
        utils.set_tracking_uri(uri)
        yield
    finally:
        utils.set_tracking_uri(before)
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def first_line(error: Exception) -> str:
    """The first line of what an error says, without passwords."""
    lines = masked(str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


DEFAULT_STORE = "mlflow.db"

STORE_VARIABLE = "MLFLOW_TRACKING_URI"

ARTIFACTS = "mlartifacts"


def tracking_uri(configured: str | None) -> str:
    """Return the store to use: the recipe's, MLFLOW_TRACKING_URI, or sqlite in the current folder (made absolute).

    A run folder's config.yaml holds the recipe's address without its password; the whole one is then expected in
    MLFLOW_TRACKING_URI. Raises UserError where it is not there, and for a database in a folder that does not exist.
    """
    told = os.environ.get(STORE_VARIABLE)
    uri = configured or told or f"sqlite:///{DEFAULT_STORE}"
    if configured and is_masked(configured):
        if told is None or masked(told) != configured:
            raise UserError(
                f"tracking.uri is {configured}, whose password is not kept in run folders; set {STORE_VARIABLE} to the "
                "whole address, or tracking.uri, or tracking.enabled=false."
            )
        uri = told
    database = _sqlite_path(uri)
    if database is None:
        return uri
    database = database.absolute()  # the working folder may change later
    if not database.parent.is_dir():
        raise UserError(f"The folder of the MLflow database {database} does not exist; create it or set tracking.uri.")
    return f"sqlite:///{database}"


def passwords_to_environment(overrides: Sequence[str]) -> list[str]:
    """Return the overrides without the password of `tracking.uri`, which goes to MLFLOW_TRACKING_URI instead.

    For the processes that a launcher starts: arguments of a process are seen by all users of a machine, and the
    launcher prints them when a process fails.
    """
    told = []
    for override in overrides:
        name, _, value = override.partition("=")
        if name.strip() == "tracking.uri" and masked(value) != value:
            os.environ[STORE_VARIABLE] = value.strip().strip("'\"")
            override = f"{name}={masked(value)}"
        told.append(override)
    return told


def artifact_location(uri: str) -> str | None:
    """Return where a new experiment keeps its files: beside a sqlite database; None leaves it to the server."""
    database = _sqlite_path(uri)
    return (database.parent / ARTIFACTS).as_uri() if database is not None else None


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
