"""Tracking against a real sqlite store: what stands in it afterwards, and that its failures do not stop a run."""

import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import TaskConfig
from pipeline.config.recipe import Recipe
from pipeline.console.progress import Progress
from pipeline.data.collate import MicroBatches
from pipeline.data.order import Order
from pipeline.errors import Interrupted, UserError
from pipeline.runs import provenance
from pipeline.tracking.open import make_tracker, sequence_facts
from pipeline.tracking.step_numbers import StepNumbers, set_shares
from pipeline.tracking.store import artifact_location, tracking_uri
from pipeline.tracking.tracker import NullTracker

CREATE_STORE = """
import sys
from pathlib import Path
from pipeline.tracking.open import make_tracker, sequence_facts
assert "mlflow" not in sys.modules
from tests.tracking.test_tracking import recipe
tracker = make_tracker(sequence_facts(recipe(Path("fresh.db").absolute())), Path("run"), rank=0)
with tracker.sequence({}):
    tracker.metrics({"loss": 1.0}, step=0)
"""


@pytest.fixture(scope="session")
def creation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    """A new store and what the process that created it printed; the tables take seconds to create, so once for all."""
    folder = tmp_path_factory.mktemp("store")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    environment.pop("MLFLOW_LOGGING_LEVEL", None)
    result = subprocess.run(
        [sys.executable, "-c", CREATE_STORE], cwd=folder, env=environment, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stderr
    return folder / "fresh.db", result


@pytest.fixture
def store(creation: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    database = tmp_path / "mlflow.db"
    shutil.copy(creation[0], database)
    yield database


def recipe(database: Path | str, enabled: bool = True, experiment: str | None = "tests") -> Recipe:
    uri = database if isinstance(database, str) else f"sqlite:///{database}"
    tasks = [{"name": "colour", "limit_train": 20}, {"name": "count", "metric": "exact_ci"}]
    return Recipe.model_validate(
        {
            "name": "small",
            "data": {"source": "generated", "root": "nowhere", "prepared": "nowhere", "tasks": tasks},
            "model": {"path": "model"},
            "keys": {"path": "clip"},
            "train": {"lr_prompt": 0.01, "lr_head": 0.001},
            "tracking": {"enabled": enabled, "uri": uri, "experiment": experiment},
        }
    )


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "prompts.safetensors").write_bytes(b"prompts")
    (folder / "meta.json").write_text("{}")
    (folder / "resume.safetensors").write_bytes(b"moments")
    return folder


def client_of(database: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{database}")


def test_ranks_above_zero_and_disabled_tracking_get_the_null_tracker(tmp_path: Path) -> None:
    assert isinstance(make_tracker(sequence_facts(recipe(tmp_path / "x.db")), tmp_path, rank=1), NullTracker)
    tracker = make_tracker(sequence_facts(recipe(tmp_path / "x.db", enabled=False)), tmp_path, rank=0)
    with tracker.sequence({}), tracker.stage(0, "colour"):
        tracker.metrics({"loss": 1.0}, step=0)
    assert tracker.run_ids() == {}
    assert list(tmp_path.iterdir()) == []


def test_a_sequence_is_a_parent_run_and_its_stages_are_children(store: Path, tmp_path: Path) -> None:
    tracker = make_tracker(sequence_facts(recipe(store)), tmp_path / "small-s0", rank=0)
    figure = tmp_path / "matrix.png"
    figure.write_bytes(b"png")
    with tracker.sequence({"versions": {"pipeline": "1"}}):
        with tracker.stage(0, "colour"):
            tracker.metrics({"loss": 2.0, "lr": 0.1, "skipped": None}, step=1)
            tracker.metrics({"loss": 1.5, "lr": 0.1}, step=2)
        tracker.metrics({"last": 80.0}, step=1)
        tracker.params({"trainable": 120})
        tracker.artifact(figure, "figures")
    client, ids = client_of(store), tracker.run_ids()
    parent, child = client.get_run(ids["parent"]), client.get_run(ids["stages"]["01-colour"])
    assert child.data.tags["mlflow.parentRunId"] == ids["parent"]
    assert [(m.step, m.value) for m in client.get_metric_history(child.info.run_id, "loss")] == [(1, 2.0), (2, 1.5)]
    assert "skipped" not in child.data.metrics
    assert parent.data.metrics == {"last": 80.0}
    assert parent.data.params["data.tasks"] == "colour, count"
    assert parent.data.params["data.tasks.count.metric"] == "exact_ci"
    assert parent.data.params["train.lr_prompt"] == "0.01"
    assert parent.data.params["trainable"] == "120"
    assert parent.data.tags["version.pipeline"] == "1"
    assert [file.path for file in client.list_artifacts(ids["parent"], "figures")] == ["figures/matrix.png"]
    assert {parent.info.status, child.info.status} == {"FINISHED"}


def test_a_restart_appends_to_the_same_runs_and_logs_parameters_once(store: Path, tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    for start in (0, 2):  # the second round is another process of the same run
        tracker = make_tracker(sequence_facts(recipe(store)), tmp_path / "small-s0", rank=0)
        with tracker.sequence(state), tracker.stage(0, "colour"):
            tracker.params({"trainable": start})
            for step in (start, start + 1):
                tracker.metrics({"loss": float(step)}, step)
        state["mlflow"] = tracker.run_ids()
    client = client_of(store)
    runs = client.search_runs([state["mlflow"]["experiment"]], filter_string="tags.mlflow.runName != 'run'")
    assert len(runs) == 2
    child = client.get_run(state["mlflow"]["stages"]["01-colour"])
    assert [m.value for m in client.get_metric_history(child.info.run_id, "loss")] == [0, 1, 2, 3]
    assert child.data.params["trainable"] == "0"
    assert child.data.tags["requeue"] == "1"


def test_run_ids_of_a_store_that_was_deleted_start_new_runs(store: Path, tmp_path: Path) -> None:
    tracker = make_tracker(sequence_facts(recipe(store)), tmp_path / "small-s0", rank=0)
    experiment = tracker.run_ids()["experiment"]
    gone = {"experiment": experiment, "parent": "0" * 32, "stages": {"01-colour": "1" * 32}}
    with tracker.sequence({"mlflow": gone}), tracker.stage(0, "colour"):
        tracker.metrics({"loss": 1.0}, 0)
    ids = tracker.run_ids()
    assert ids["parent"] != gone["parent"]
    assert client_of(store).get_run(ids["stages"]["01-colour"]).data.metrics == {"loss": 1.0}


def test_a_stage_checkpoint_is_found_as_a_logged_model_by_its_metrics(store: Path, tmp_path: Path) -> None:
    tracker = make_tracker(sequence_facts(recipe(store)), tmp_path / "small-s0", rank=0)
    with tracker.sequence({}):
        for index, (name, accuracy) in enumerate([("colour", 90.0), ("count", 40.0)]):
            with tracker.stage(index, name):
                folder = checkpoint(tmp_path / name)
                tracker.stage_model(folder, f"{index + 1:02d}-{name}", {"accuracy": accuracy})
                tracker.stage_model(folder, f"{index + 1:02d}-{name}", {"accuracy": accuracy})  # a repeat adds nothing
    client, ids = client_of(store), tracker.run_ids()
    assert len(client.search_logged_models([ids["experiment"]])) == 2
    assert client.search_logged_models([ids["experiment"]], filter_string="metrics.score > 0") == []
    with tracker.sequence({"mlflow": ids}):
        tracker.model_metrics("01-colour", {"score": 88.0}, step=1)
        tracker.model_metrics("unknown", {"score": 88.0}, step=1)
    assert len(client.search_logged_models([ids["experiment"]], filter_string="metrics.score > 50")) == 1
    (model,) = client.search_logged_models([ids["experiment"]], filter_string="metrics.accuracy > 50")
    assert (model.name, str(model.status)) == ("01-colour", "READY")
    assert model.source_run_id == ids["stages"]["01-colour"]
    files = sorted(path.name for path in Path(model.artifact_location.removeprefix("file://")).rglob("*.*"))
    assert files == ["meta.json", "prompts.safetensors"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("boom"), "FAILED"),
        (Interrupted("stop"), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(75), "KILLED"),
        (SystemExit(1), "FAILED"),
        (SystemExit(0), "FINISHED"),
    ],
)
def test_a_run_ends_with_what_happened(store: Path, tmp_path: Path, error: BaseException, status: str) -> None:
    tracker = make_tracker(sequence_facts(recipe(store)), tmp_path / "small-s0", rank=0)
    with pytest.raises(type(error)), tracker.sequence({}), tracker.stage(0, "colour"):
        raise error
    client, ids = client_of(store), tracker.run_ids()
    assert client.get_run(ids["parent"]).info.status == status
    assert client.get_run(ids["stages"]["01-colour"]).info.status == status


@pytest.mark.parametrize(
    "error", [UserError("damaged"), Interrupted("stop"), SystemExit(2)], ids=lambda e: type(e).__name__
)
def test_a_call_that_fails_on_a_finished_run_leaves_its_end_and_its_numbers(
    store: Path, tmp_path: Path, error: BaseException
) -> None:
    tracker = make_tracker(sequence_facts(recipe(store)), tmp_path / "small-s0", rank=0)
    with tracker.sequence({}), tracker.stage(0, "colour"):
        tracker.stage_model(checkpoint(tmp_path / "stage"), "colour", {})
    state = {"status": "done", "mlflow": tracker.run_ids()}
    client, parent = client_of(store), tracker.run_ids()["parent"]
    during: list[str] = []

    def evaluates(fails: bool) -> None:
        again = make_tracker(sequence_facts(recipe(store)), tmp_path / "small-s0", rank=0)
        with again.sequence(state, stays_finished=lambda stopped: True):
            again.metrics({"zero_shot.colour": 7.0}, 0)
            again.metrics({"accuracy.colour": 8.0}, 1)
            again.model_metrics("colour", {"accuracy.colour": 8.0}, 1)
            during.append(client.get_run(parent).info.status)
            if fails:
                raise error
            again.metrics({"last": 8.0}, 1)

    ended = client.get_run(parent).info.end_time
    with pytest.raises(type(error)):
        evaluates(fails=True)
    found = client.get_run(parent)
    assert (found.info.status, found.info.end_time, found.data.metrics) == ("FINISHED", ended, {})
    (model,) = client.search_logged_models([found.info.experiment_id])
    assert not model.metrics
    evaluates(fails=False)
    found = client.get_run(parent)
    assert (found.info.status, found.data.metrics["accuracy.colour"]) == ("FINISHED", 8.0)
    assert found.data.metrics.keys() == {"last", "zero_shot.colour", "accuracy.colour"}
    (model,) = client.search_logged_models([found.info.experiment_id])
    assert [(metric.key, metric.value) for metric in model.metrics] == [("accuracy.colour", 8.0)]
    assert during == ["FINISHED", "FINISHED"]  # what ends the process without a word leaves no run that runs for ever


def test_a_finished_run_runs_while_it_learns_another_task_and_ends_with_what_the_folder_says(
    store: Path, tmp_path: Path
) -> None:
    tracker = make_tracker(sequence_facts(recipe(store)), tmp_path / "small-s0", rank=0)
    with tracker.sequence({}), tracker.stage(0, "colour"):
        pass
    state = {"status": "done", "mlflow": tracker.run_ids()}
    client, parent = client_of(store), tracker.run_ids()["parent"]
    for error, status in ((RuntimeError("boom"), "FINISHED"), (Interrupted("stop"), "KILLED")):
        again = make_tracker(sequence_facts(recipe(store)), tmp_path / "small-s0", rank=0)
        sequence = again.sequence(state, stays_finished=lambda stopped: not stopped)
        with pytest.raises(type(error)), sequence, again.stage(1, "count"):
            assert client.get_run(parent).info.status == "RUNNING"
            raise error
        assert client.get_run(parent).info.status == status


def test_a_store_that_fails_while_training_costs_one_warning_and_no_metric(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker: Any = make_tracker(sequence_facts(recipe(store)), tmp_path / "small-s0", rank=0)
    with caplog.at_level(logging.WARNING, "pipeline"), tracker.sequence({}), tracker.stage(0, "colour"):
        with monkeypatch.context() as broken:

            def refuse(*args: Any, **kwargs: Any) -> None:
                raise OSError("disk full")

            for method in ("log_batch", "log_artifact", "create_logged_model", "get_run"):
                broken.setattr(tracker.client, method, refuse)
            tracker.metrics({"loss": 3.0}, step=1)
            tracker.metrics({"loss": 2.0}, step=2)
            tracker.params({"trainable": 1})
            tracker.artifact(store)
            tracker.stage_model(checkpoint(tmp_path / "stage"), "01-colour", {})
        tracker.metrics(
            {"loss": 1.0}, step=3
        )  # the store answers again, and is asked at the latest when the stage ends
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("pipeline")]
    assert len(warnings) == 1
    assert "disk full" in warnings[0] and "training goes on" in warnings[0]
    history = client_of(store).get_metric_history(tracker.run_ids()["stages"]["01-colour"], "loss")
    assert [metric.value for metric in history] == [3.0, 2.0, 1.0]


def test_a_store_that_cannot_be_opened_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(UserError, match=r"cannot be used .* Set tracking.uri"):
        make_tracker(sequence_facts(recipe(tmp_path / "broken.db")), tmp_path, rank=0)
    with pytest.raises(UserError, match="does not exist; create it"):
        make_tracker(sequence_facts(recipe(tmp_path / "missing" / "x.db")), tmp_path, rank=0)


def test_a_server_that_does_not_answer_is_reported_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="cannot be used"):
        make_tracker(sequence_facts(recipe("http://127.0.0.1:9")), tmp_path, rank=0)


def test_the_default_store_is_sqlite_in_the_working_folder_with_artifacts_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(None) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert artifact_location(tracking_uri(None)) == (tmp_path / "mlartifacts").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri(None) == "http://server:5000"
    assert artifact_location("http://server:5000") is None
    assert tracking_uri("sqlite:///own.db") == f"sqlite:///{tmp_path / 'own.db'}"


def test_creating_a_store_is_silent_and_importing_tracking_does_not_import_mlflow(creation: tuple[Path, Any]) -> None:
    database, result = creation
    assert result.stdout + result.stderr == ""
    assert database.is_file()


def test_shares_count_the_samples_that_get_each_earlier_set() -> None:
    import torch

    from pipeline.data.selection import Selection

    selected = Selection(torch.tensor([[0, 1], [0, -1], [-1, -1], [0, -1]]))
    assert set_shares(selected, ["colour", "count"]) == {"routing_share.colour": 75.0, "routing_share.count": 25.0}
    assert set_shares(Selection.none(3), []) == {}


def test_a_step_tells_its_memory_and_the_shares_since_the_step_before() -> None:
    import torch

    # One batch of four samples a step, and a set 2 that no sample gets.
    order = Order(8, 4, seed=0, task=0)
    selected = torch.full((8, 2), -1)
    first, second = (order.batch(0, number)[0].tolist() for number in range(2))
    selected[first[:1], 0] = 0
    selected[second, 0] = 1
    nothing: Any = None
    numbers = StepNumbers(MicroBatches(nothing, order, selected, 4, 1, 0, 2), ["colour", "count", "shape"])
    told = [numbers(Progress(step, 1.0, {"loss_lm": 1.0}, 0.1, 5.0, 20.0)) for step in (1, 2, 4)]
    assert (told[0]["samples_per_s"], told[0]["answer_tokens_per_s"]) == (5.0, 20.0)
    assert [step["routing_share_of_step.colour"] for step in told[:2]] == [25.0, 0.0]
    assert [step["routing_share_of_step.count"] for step in told[:2]] == [0.0, 100.0]
    # Steps 3 and 4 are the second epoch: every sample once.
    assert (told[2]["routing_share_of_step.colour"], told[2]["routing_share_of_step.count"]) == (12.5, 50.0)
    assert "routing_share_of_step.shape" not in told[0]
    assert 0.05 < told[0]["memory_gib"] < 100 and told[0]["loss_lm"] == 1.0


def test_what_a_run_leaves_is_uploaded_and_an_incomplete_one_is_not_registered(store: Path, tmp_path: Path) -> None:
    from tests.report.test_report import TASKS, make_run

    run = make_run(tmp_path / "small-s0")
    (run / "report.html").write_text("page")
    tracker = make_tracker(sequence_facts(recipe(store)), run, rank=0)
    with tracker.sequence({}):
        tracker.results(run)
    client, parent = client_of(store), tracker.run_ids()["parent"]
    files = [file.path for file in client.list_artifacts(parent, "predictions")]
    assert files == sorted(f"predictions/{task}.jsonl" for task in TASKS)
    assert {"report.html", "matrix.json"} <= {file.path for file in client.list_artifacts(parent)}
    assert client.search_registered_models() == []


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository that stands for the project, with one commit."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.py").write_text("rate = 1\n")
    (folder / ".gitignore").write_text("*.db\n")
    git(folder, "init", "--quiet")
    commit(folder)
    monkeypatch.setattr(provenance, "_REPOSITORY", folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(folder: Path) -> str:
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", "a change")
    return git(folder, "rev-parse", "HEAD")


def tracked(recipe: Recipe, run: Path, state: dict[str, Any]) -> Any:
    """Track a run that does nothing; `state` is what run.json holds of MLflow before and after. Returns the parent."""
    tracker = make_tracker(sequence_facts(recipe), run, rank=0)
    with tracker.sequence(state):
        pass
    state["mlflow"] = tracker.run_ids()
    assert recipe.tracking.uri is not None
    return client_of(Path(recipe.tracking.uri.removeprefix("sqlite:///"))).get_run(state["mlflow"]["parent"])


def uploaded(run: Any, name: str) -> str:
    return (Path(run.info.artifact_uri.removeprefix("file://")) / name).read_text()


def test_the_parent_run_has_the_commit_and_what_is_not_committed(store: Path, tmp_path: Path, repository: Path) -> None:
    (repository / "train.py").write_text("rate = 2\n")
    run = tracked(recipe(store), tmp_path / "small-s0", {})
    assert run.data.tags["mlflow.source.git.commit"] == git(repository, "rev-parse", "HEAD")
    assert "-rate = 1\n+rate = 2" in uploaded(run, "uncommitted.diff")


def test_the_parent_run_has_the_versions_the_data_and_the_job(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = tmp_path / "data" / "count" / "test"
    split.mkdir(parents=True)
    (split / "dataset.json").write_text('{"fingerprint": "abc"}')
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    small = recipe(store)
    small = small.model_copy(update={"data": small.data.model_copy(update={"prepared": str(tmp_path / "data")})})
    tags = tracked(small, tmp_path / "small-s0", {}).data.tags
    for package in ("torch", "transformers", "deepspeed", "webdataset", "safetensors", "numpy"):
        assert tags[f"version.{package}"] == metadata.version(package)
    assert tags["version.python"] == platform.python_version()
    assert tags["data.count.test"] == "abc" and "data.count.train" not in tags
    assert (tags["slurm_job_id"], tags["slurm_array_task_id"]) == ("17", "3")


def test_a_run_that_goes_on_is_described_as_it_is_now(
    store: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = tmp_path / "small-s0", dict[str, Any](versions={"torch": "0.1"})
    run.mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    (repository / "train.py").write_text("rate = 2\n")
    (run / "config.yaml").write_text("tasks: two")
    tracked(recipe(store), run, state)
    newest = commit(repository)
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    (run / "config.yaml").write_text("tasks: three")
    now = tracked(recipe(store), run, state)
    assert (now.data.tags["mlflow.source.git.commit"], now.data.tags["slurm_job_id"]) == (newest, "18")
    assert now.data.tags["version.torch"] == metadata.version("torch")
    assert (uploaded(now, "config.yaml"), uploaded(now, "uncommitted.diff")) == ("tasks: three", "")


def test_a_task_that_was_added_is_among_the_parameters_and_a_changed_one_is_a_tag(store: Path, tmp_path: Path) -> None:
    first, state = recipe(store), dict[str, Any]()
    tracked(first, tmp_path / "small-s0", state)
    data = first.data.model_copy(update={"tasks": (*first.data.tasks, TaskConfig(name="shelf", metric="iou"))})
    second = first.model_copy(update={"data": data, "method": first.method.model_copy(update={"gate": 0.5})})
    now = tracked(second, tmp_path / "small-s0", state)
    assert now.data.params["data.tasks.shelf.metric"] == "iou"
    assert now.data.tags["changed.data.tasks"] == "colour, count, shelf"
    assert (now.data.params["method.gate"], now.data.tags["changed.method.gate"]) == ("null", "0.5")
    again = tracked(first, tmp_path / "small-s0", state)
    assert not [name for name in again.data.tags if name.startswith("changed.")]
