"""The benchmark of MLflow's lists: its copies of a sequence are runs like those that a tracker writes."""

from __future__ import annotations

from pathlib import Path

from pipeline.bench.tracking import bench_tracking, copy_sequences, write_sequence
from pipeline.config.load import load_recipe
from pipeline.tracking.store import open_store

STAGES = len(load_recipe("nano").data.tasks)


def test_copied_sequences_have_identities_scores_and_stages_of_their_own(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    write_sequence(database)
    copy_sequences(database, 3)
    client, experiment = open_store(f"sqlite:///{database}", "nano")
    runs = client.search_runs([experiment], max_results=1000)
    parents = [run for run in runs if run.data.tags["kind"] == "sequence"]
    assert (len(runs), len(parents)) == (3 * (1 + STAGES), 3)
    assert {run.data.metrics["last"] for run in parents} == {70.0, 3.7, 7.4}
    ids = [run.info.run_id for run in parents]
    children = [run.data.tags["mlflow.parentRunId"] for run in runs if run not in parents]
    assert [children.count(parent) for parent in ids] == [STAGES] * 3
    assert {len(run.data.params) for run in parents} == {len(parents[0].data.params)} and parents[0].data.params
    stage = next(run for run in runs if run.data.tags.get("mlflow.parentRunId") == ids[-1])
    assert len(client.get_metric_history(stage.info.run_id, "loss")) == 6


def test_every_query_is_measured_on_both_stores() -> None:
    found = bench_tracking(2 * (1 + STAGES), rounds=1)["variants"]
    assert found["all runs"]["runs"] == 2 * (1 + STAGES)
    assert found["sequences alone, by last"]["runs"] == 2
    assert found["last above 50, by last"]["runs"] == 1
    assert all(numbers["processor_s"] >= 0 and numbers["ratio"] > 0 for numbers in found.values())
