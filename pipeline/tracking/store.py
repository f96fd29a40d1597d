"""The MLflow store of a run: its address, opening it, its experiment, and setting it as MLflow's global store."""

from __future__ import annotations

import contextlib
import json
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
VIEW = "scores"  # the name of the view with the columns below: ?viewStateShareKey=scores on MLflow's page of runs
SCORES = ("last", "forgetting", "told", "routing.accuracy", "gain", "format_free")
COLUMNS = (*(f"metrics.`{name}`" for name in SCORES), "params.`method.name`", "params.`seed`")
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # the UI shows it as training, not as GenAI
    "mlflow.experiment.primaryMetric.name": "last",  # the first chart
    # MLflow's pages show no metric by default. What its button "Share" would save is written here.
    f"mlflow.sharedViewState.{VIEW}": json.dumps(
        {"selectedColumns": COLUMNS, "orderByKey": COLUMNS[0], "orderByAsc": False}
    ),
}
# Parts of the error messages of a process that creates a row, or a new database's tables, at the same time as another.
COLLISIONS = ("already exists", "unique constraint", "duplicate", "database is locked", "already_exists")
ATTEMPTS = 6

QUIET_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # otherwise each database migration logs a line
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's default of seven, with growing pauses, blocks for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def logged_model_name(name: str) -> str:
    """A name as MLflow takes it for a logged model: other characters than letters, digits, `-` and `_` become `-`."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)


def open_store(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """Return a client of the store and the id of the experiment, which is created if it does not exist.

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
    with contextlib.suppress(Exception):  # of an earlier version; a store that is read only keeps its pages as they are
        for tag, value in EXPERIMENT_TAGS.items():
            if tag not in experiment.tags:
                client.set_experiment_tag(experiment.experiment_id, tag, value)
    return str(experiment.experiment_id)


def against_others(work: Callable[[], Result]) -> Result:
    """Call `work`, and call it again when it collides with another process that creates the same entry.

    MLflow checks for an entry and creates it in two transactions, so another process can create it in between; the next
    attempt finds it.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return work()
        except UserError:
            raise
        except Exception as error:
            if not any(word in str(error).lower() for word in COLLISIONS):
                raise
            # Random pauses, because the other processes retry too. The tables of a new database take a few seconds.
            time.sleep(random.uniform(0.1, 0.5) * attempt)
    return work()


@contextlib.contextmanager
def store_in_use(uri: str) -> Iterator[None]:
    """Set `uri` as MLflow's global tracking store while the block runs, and restore the previous one after it.

    MLflow's registry in a database, and its saving of models, look up the logged model by a client for the global
    store: with another one they do not find it, and create a `mlflow.db` in the working folder.
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
    """The first line of an error's message, without passwords."""
    lines = masked(str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


DEFAULT_STORE = "mlflow.db"

STORE_VARIABLE = "MLFLOW_TRACKING_URI"

ARTIFACTS = "mlartifacts"


def tracking_uri(configured: str | None) -> str:
    """Return the store's address: the recipe's, MLFLOW_TRACKING_URI, or sqlite in the current folder (absolute).

    config.yaml of a run folder has the recipe's address without its password; MLFLOW_TRACKING_URI must then hold the
    complete address. Raises UserError where it does not, and for a database in a folder that does not exist.
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
    """Return the overrides without the password of `tracking.uri`; the complete address is set in MLFLOW_TRACKING_URI.

    For processes that a launcher starts: a process's arguments are visible to all users of the machine, and the
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
    """Return the place for a new experiment's files: beside a sqlite database; None: the server decides."""
    database = _sqlite_path(uri)
    return (database.parent / ARTIFACTS).as_uri() if database is not None else None


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
