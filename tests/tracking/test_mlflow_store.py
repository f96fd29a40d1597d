"""Stores that several processes use at once, addresses with passwords, and the registry of the run's own store."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pipeline.adapter import registry
from pipeline.adapter.registry import Version, is_better, register_adapter, set_aliases
from pipeline.errors import UserError
from pipeline.files.passwords import masked
from pipeline.tracking.open import make_tracker, sequence_facts
from pipeline.tracking.store import (
    ATTEMPTS,
    against_others,
    open_store,
    passwords_to_environment,
    store_in_use,
    tracking_uri,
)
from pipeline.tracking.tracker import StoredRun
from tests.tracking.test_tracking import client_of, creation, recipe, store, tracked

__all__ = ["creation", "store"]  # fixtures

SECRET = "postgresql://someone:s3cr/t@home@127.0.0.1:1/runs"
SHOWN = "postgresql://someone:***@127.0.0.1:1/runs"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (SECRET, SHOWN),
        (f"cannot reach '{SECRET}' now", f"cannot reach '{SHOWN}' now"),
        ("https://a:b@one/x and https://c:d@two/", "https://a:***@one/x and https://c:***@two/"),
        ("mysql+pymysql://host/db?user=a&password=b&ssl=1", "mysql+pymysql://host/db?user=a&password=***&ssl=1"),
        ("sqlite:////home/a:b@c.db", "sqlite:////home/a:b@c.db"),
    ],
)
def test_passwords_are_not_shown_and_nothing_else_is_hidden(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked(shown) == shown


def test_a_store_that_cannot_be_used_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        make_tracker(sequence_facts(recipe(SECRET)), tmp_path, rank=0)
    assert SHOWN in str(error.value) and "s3cr" not in str(error.value)


def test_a_run_folder_keeps_the_address_without_its_password(tmp_path: Path) -> None:
    recipe(SECRET).dump_yaml(tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "s3cr" not in text
    assert yaml.safe_load(text)["tracking"]["uri"] == SHOWN


def test_an_address_from_a_run_folder_gets_its_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI to the whole address"):
        tracking_uri(SHOWN)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET.replace("runs", "others"))
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        tracking_uri(SHOWN)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET)
    assert tracking_uri(SHOWN) == SECRET


def test_ranks_are_told_a_password_by_their_environment_and_not_by_their_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert passwords_to_environment(["seed=1", f"tracking.uri={SECRET}"]) == ["seed=1", f"tracking.uri={SHOWN}"]
    assert tracking_uri(SHOWN) == SECRET
    assert passwords_to_environment(["tracking.uri=sqlite:///a.db"]) == ["tracking.uri=sqlite:///a.db"]


def test_neither_parameters_nor_the_uploaded_recipe_hold_a_password(store: Path, tmp_path: Path) -> None:
    tracker: Any = make_tracker(sequence_facts(recipe(store)), tmp_path / "small-s0", rank=0)
    tracker._description.facts = sequence_facts(recipe(SECRET))
    (tmp_path / "small-s0").mkdir()
    (tmp_path / "small-s0" / "config.yaml").write_text(f"tracking: {{uri: {SECRET}}}\n")  # as versions before wrote it
    with tracker.sequence({}):
        pass
    run = client_of(store).get_run(tracker.run_ids()["parent"])
    assert run.data.params["tracking.uri"] == SHOWN
    files = Path(run.info.artifact_uri.removeprefix("file://"))
    assert "s3cr" not in "".join(path.read_text() for path in files.rglob("*.*"))


def test_an_experiment_that_another_process_makes_meanwhile_is_used(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    uri, create = f"sqlite:///{store}", MlflowClient.create_experiment

    def after_the_other(self: Any, name: str, **named: Any) -> str:
        monkeypatch.setattr(MlflowClient, "create_experiment", create)
        open_store(uri, name)  # the other process, between our look and our creation
        return create(self, name, **named)

    monkeypatch.setattr(MlflowClient, "create_experiment", after_the_other)
    client, experiment = open_store(uri, "raced")
    assert experiment == client.get_experiment_by_name("raced").experiment_id


def test_what_is_no_collision_is_not_tried_again_and_a_lasting_collision_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.tracking.store.time.sleep", lambda seconds: None)
    for error, times in ((OSError("disk full"), 1), (ValueError("table runs already exists"), ATTEMPTS)):
        tried: list[Exception] = []

        def work(tried: list[Exception] = tried, error: Exception = error) -> None:
            tried.append(error)
            raise error

        with pytest.raises(type(error)):
            against_others(work)
        assert len(tried) == times


def test_mlflow_takes_the_runs_store_for_its_own_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other:5000")
    with store_in_use("sqlite:////tmp/run.db"):
        assert mlflow.get_tracking_uri() == "sqlite:////tmp/run.db"
    assert mlflow.get_tracking_uri() == os.environ["MLFLOW_TRACKING_URI"] == "http://other:5000"


@pytest.fixture
def saved_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving a model takes seconds; of it the tests here need only that there are files."""
    from mlflow import pyfunc

    def save(path: str, **named: Any) -> None:
        Path(path).mkdir()
        (Path(path) / "MLmodel").write_text("flavors: {}\n")

    monkeypatch.setattr(pyfunc, "save_model", save)


def registered(store: Path, tmp_path: Path, version: Version) -> str:
    client, experiment = open_store(f"sqlite:///{store}", "tests")
    run = client.create_run(experiment)
    with store_in_use(f"sqlite:///{store}"):
        return register_adapter(client, experiment, run.info.run_id, tmp_path, version)[1]


@pytest.mark.usefixtures("saved_quickly")
def test_an_adapter_is_registered_in_the_store_of_the_recipe_and_nothing_is_written_elsewhere(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert registered(store, tmp_path, Version("small", 0, "abc", ["A"], 50.0)) == "1"
    (version,) = client_of(store).search_model_versions("name = 'small'")
    assert version.tags["prompt_sets"] == "abc"
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.usefixtures("saved_quickly")
def test_a_name_with_a_dot_is_registered_as_it_is(store: Path, tmp_path: Path) -> None:
    registered(store, tmp_path, Version("v1.5-my_methods.Mine", 0, "abc", ["A"], 50.0))
    (version,) = client_of(store).search_model_versions("name = 'v1.5-my_methods.Mine'")
    model = client_of(store).get_logged_model(version.source.removeprefix("models:/"))
    assert model.name == "v1-5-my_methods-Mine"


@pytest.mark.usefixtures("saved_quickly")
def test_best_is_the_highest_score_over_the_newest_ones_tasks(store: Path, tmp_path: Path) -> None:
    scores = [("A", 99.0), ("A, B", 70.0), ("A, B", 30.0), ("A, B", None)]
    for number, (tasks, score) in enumerate(scores):
        registered(store, tmp_path, Version("small", number, str(number), tasks.split(", "), score))
    client = client_of(store)
    found = {alias: client.get_model_version_by_alias("small", alias).version for alias in ("newest", "best", "seed-2")}
    assert {alias: int(version) for alias, version in found.items()} == {"newest": 4, "best": 2, "seed-2": 3}
    # A slower process that made an earlier version sets the aliases last.
    client.set_registered_model_alias("small", "newest", "1")
    set_aliases(client, "small")
    assert int(client.get_model_version_by_alias("small", "newest").version) == 4


def test_an_experiment_has_a_view_with_the_scores_an_older_one_too(store: Path) -> None:
    from mlflow import MlflowClient

    old = MlflowClient(f"sqlite:///{store}").create_experiment("old")
    for name in ("new", "old"):
        client, experiment = open_store(f"sqlite:///{store}", name)
        tags = client.get_experiment(experiment).tags
        view = json.loads(tags["mlflow.sharedViewState.scores"])
        assert view["selectedColumns"][0] == view["orderByKey"] == "metrics.`last`"
        assert tags["mlflow.experiment.primaryMetric.name"] == "last"
    assert experiment == old


def test_an_adapter_is_better_than_versions_with_the_same_tasks_alone() -> None:
    class Known:
        def __init__(self, tasks: str, last: str | None) -> None:
            self.tags = {"tasks": tasks} | ({} if last is None else {"last": last})

    known: Any = [Known("A", "99.0"), Known("A, B", "70.0"), Known("A, B", "60.0"), Known("A, B", None)]
    versions = {score: Version("small", 0, "abc", ["A", "B"], score) for score in (70.1, 70.0, 70.00004, 10.0, None)}
    assert [score for score, version in versions.items() if is_better(version, known)] == [70.1]
    assert is_better(Version("small", 0, "abc", ["C"], 1.0), known)  # the first of its tasks
    assert is_better(versions[None], [])


@pytest.mark.usefixtures("saved_quickly")
@pytest.mark.parametrize(("always", "versions"), [(False, 1), (True, 2)])
def test_a_worse_run_is_registered_only_when_it_is_asked_for(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always: bool, versions: int
) -> None:
    from tests.report.test_report import make_run

    better, worse = make_run(tmp_path / "better"), make_run(tmp_path / "worse")
    matrix = json.loads((worse / "matrix.json").read_text())
    matrix["accuracy"][2] = [1.0, 1.0, 1.0]
    (worse / "matrix.json").write_text(json.dumps(matrix))
    monkeypatch.setattr(registry, "export", lambda run, folder: folder.mkdir())
    for seed, run in enumerate((better, worse, better)):  # the last one is there already
        content = SimpleNamespace(pool=SimpleNamespace(whole_fingerprint=lambda run=run: run.name))
        monkeypatch.setattr(registry, "read_adapter", lambda folder, own, content=content: content)
        client, experiment = open_store(f"sqlite:///{store}", "tests")
        stored = StoredRun(client, f"sqlite:///{store}", experiment, client.create_run(experiment).info.run_id)
        with store_in_use(stored.uri):
            registry.register_run(stored, run, "small", seed, always)
    assert len(client_of(store).search_model_versions("name = 'small'")) == versions
    for alias, number in (("best", 1), ("newest", versions)):
        assert int(client_of(store).get_model_version_by_alias("small", alias).version) == number


def test_the_headline_is_the_first_number_of_a_sequence_and_nothing_is_lost(store: Path, tmp_path: Path) -> None:
    import sqlite3

    for name, ends_early in (("whole", False), ("stopped", True)):
        tracker = make_tracker(sequence_facts(recipe(store)), tmp_path / name, rank=0)
        with tracker.sequence({}):
            tracker.metrics({"zero_shot.colour": 0.0}, 0)
            with tracker.stage(0, "colour"):
                tracker.metrics({"loss": 1.0}, 1)
            if not ends_early:
                tracker.metrics({"accuracy.colour": 80.0}, 1)
                tracker.metrics({"average": 70.0, "last": 80.0}, 1)
        parent = tracker.run_ids()["parent"]
        with sqlite3.connect(store) as database:
            rows = database.execute(
                "select key from latest_metrics where run_uuid = ? order by rowid", (parent,)
            ).fetchall()
        logged = {key for (key,) in rows}
        assert "zero_shot.colour" in logged
        assert ends_early or (rows[0] == ("last",) and logged >= {"average", "accuracy.colour"})


def test_the_report_s_summary_and_the_matrix_are_with_the_run(store: Path, tmp_path: Path) -> None:
    from tests.report.test_report import make_run

    run = make_run(tmp_path / "small-s0")
    tracker = make_tracker(sequence_facts(recipe(store)), run, rank=0)
    with tracker.sequence({}):
        tracker.results(run)
    found = client_of(store).get_run(tracker.run_ids()["parent"])
    assert {"zero_shot", "gain"} <= set(found.data.metrics)
    assert "| percent |" in found.data.tags["mlflow.note.content"]


def test_prepared_data_is_an_input_of_the_run_once(store: Path, tmp_path: Path) -> None:
    split = tmp_path / "data" / "colour" / "train"
    split.mkdir(parents=True)
    (split / "dataset.json").write_text('{"fingerprint": "abc"}')
    small = recipe(store)
    small = small.model_copy(update={"data": small.data.model_copy(update={"prepared": str(tmp_path / "data")})})
    state: dict[str, Any] = {}
    tracked(small, tmp_path / "small-s0", state)
    run = tracked(small, tmp_path / "small-s0", state)  # it goes on
    (found,) = run.inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("colour-train", "abc")
