"""A real MLflow server in a process of its own: runs are tracked there, and an adapter is loaded from its registry."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.recipe import Recipe
from pipeline.errors import UserError
from pipeline.ranks.environment import free_port
from pipeline.sequence.run import run_sequence
from pipeline.tracking.store import VIEW
from tests.browser.chromium import DESKTOP, chromium
from tests.e2e.conftest import recipe_on

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    store = f"sqlite:///{folder / 'mlflow.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(1)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers would take their time, and nothing of it is kept
        process.wait(60)


@pytest.fixture(scope="module")
def runs(server: str, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Recipe]:
    """Two finished runs of one recipe, the first of which was started again when it was finished."""
    folder = tmp_path_factory.mktemp("tracked")
    tracking = {"enabled": True, "uri": server, "experiment": "served", "registry": "always"}
    recipes = [recipe_on(prepared, folder, tasks=2, seed=seed, tracking=tracking) for seed in (0, 1)]
    for recipe in (*recipes, recipes[0]):
        run_sequence(recipe)
    return recipes


def client(server: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(server)


def test_the_server_has_what_a_run_is_compared_by(server: str, runs: list[Recipe]) -> None:
    ids = json.loads((runs[0].run_path / "run.json").read_text())["mlflow"]
    parent = client(server).get_run(ids["parent"])
    assert parent.data.params["method.name"] == "modalprompt"
    assert "accuracy.T1" in parent.data.metrics and parent.data.tags["requeue"] == "1"
    files = {file.path for file in client(server).list_artifacts(ids["parent"])}
    assert files >= {"report.html", "matrix.json", "figures", "predictions", "config.yaml"}
    stage = client(server).get_run(ids["stages"]["02-T1"])
    assert 0 <= stage.data.metrics["routing_share.T0"] <= 100
    assert stage.data.metrics["memory_gib"] > 0 and stage.data.metrics["samples_per_s"] > 0


def test_a_finished_run_is_one_version_of_its_model(server: str, runs: list[Recipe]) -> None:
    versions = client(server).search_model_versions("name = 'tiny-modalprompt'")
    assert sorted(version.version for version in versions) == ["1", "2"]  # the restart added none
    for seed, version in ((0, "1"), (1, "2")):
        assert client(server).get_model_version_by_alias("tiny-modalprompt", f"seed-{seed}").version == version
    assert client(server).get_model_version_by_alias("tiny-modalprompt", "newest").version == "2"


def test_the_registered_adapter_answers_a_frame_as_predict_does(
    server: str, runs: list[Recipe], prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas
    from mlflow import pyfunc

    from pipeline.adapter.predict import predict

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", server)
    model = pyfunc.load_model("models:/tiny-modalprompt@seed-0", model_config={"files": True})
    picture = sorted((prepared / "coin" / "images").glob("T0*.png"))[0]
    encoded = base64.b64encode(picture.read_bytes()).decode()
    frame = pandas.DataFrame({"question": ["what?"] * 4, "image": [str(picture), picture.read_bytes(), encoded, None]})
    answers = model.predict(frame)
    expected = predict(runs[0].run_path, picture, "what?")
    assert list(answers["answer"][:3]) == [expected["answer"]] * 3
    assert answers["answer"][3] == predict(runs[0].run_path, None, "what?")["answer"]
    assert json.loads(answers["similarity"][0]) == pytest.approx(expected["similarity"], abs=2e-4)
    with pytest.raises(UserError, match="neither a file here nor base64"):
        model.unwrap_python_model().predict(None, pandas.DataFrame({"question": ["?"], "image": ["nowhere.png"]}))


@pytest.mark.browser
def test_the_list_of_runs_has_columns_with_the_scores(server: str, runs: list[Recipe], tmp_path: Path) -> None:
    experiment = json.loads((runs[0].run_path / "run.json").read_text())["mlflow"]["experiment"]
    with chromium(2600, 1000) as page:  # the page draws the columns that are in view alone
        page.open(f"{server}/#/experiments/{experiment}/runs?viewStateShareKey={VIEW}")
        for _ in range(60):
            if page.script("document.querySelectorAll('.ag-header-cell-text, [role=columnheader]').length") > 5:
                break
            time.sleep(1)
        time.sleep(5)  # the columns are set after the table is drawn
        text = page.script("[...document.querySelectorAll('[role=columnheader]')].map(e => e.innerText).join(' ')")
        page.screenshot(Path(os.environ.get("SCREENSHOTS", tmp_path)) / "mlflow-runs.png", whole=False)
    assert all(name in text for name in ("last", "forgetting", "gain", "method.name")), text


@pytest.mark.browser
def test_the_runs_are_compared_in_a_browser(server: str, runs: list[Recipe], tmp_path: Path) -> None:
    ids = [json.loads((recipe.run_path / "run.json").read_text())["mlflow"] for recipe in runs]
    parents, experiment = json.dumps([i["parent"] for i in ids]), json.dumps([ids[0]["experiment"]])
    with chromium(*DESKTOP) as page:
        page.open(f"{server}/#/compare-runs?runs={parents}&experiments={experiment}")
        for _ in range(60):
            if "modalprompt-1" in page.script("document.body.innerText"):
                break
            time.sleep(1)
        text = page.script("document.body.innerText")
        page.screenshot(Path(os.environ.get("SCREENSHOTS", tmp_path)) / "mlflow-compare.png", whole=False)
    assert "modalprompt-0" in text and "modalprompt-1" in text
