"""A verb that fails leaves what a finished benchmark has as it was, whichever verb it is and whatever is wrong."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from data_prep.benchmark import prepare_benchmark
from pipeline.cli.commands import app
from pipeline.clip.benchmark.run import run_benchmark
from pipeline.errors import EXIT_OK
from tests.clip.project import make_project, recipe, recipe_file, split_file
from tests.wrong_inputs import flipped, full_disk_of, replaced

COOP: dict[str, Any] = {"name": "coop", "options": {"length": 2}, "train": {"augment": "none"}}
KEPT = ("run.json", "results.json", "report.html", "config.yaml")


@dataclass(frozen=True)
class Finished:
    """A finished and tracked benchmark of zero-shot and CoOp with two seeds."""

    project: Path

    @property
    def run(self) -> Path:
        return self.project / "runs" / "tiny"

    def content(self) -> dict[str, bytes]:
        """The files that say what is finished, by name."""
        paths = [*(self.run / name for name in KEPT), *sorted((self.run / "units").rglob("*"))]
        return {str(path.relative_to(self.run)): path.read_bytes() for path in paths if path.is_file()}

    def state(self) -> dict[str, Any]:
        return json.loads((self.run / "run.json").read_text())

    def call(self, verb: str) -> Result:
        of_the_recipe = verb in ("run", "train")
        return CliRunner().invoke(app, [verb, str(self.project / "tiny.yaml" if of_the_recipe else self.run)])


def make(folder: Path) -> Finished:
    """The benchmark, and beside its prepared data the same with another class name."""
    make_project(folder)
    changes: dict[str, Any] = {
        "data": {"prepare_first": False},
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    }
    recipe_file(folder, "zero_shot", COOP, **changes)
    made = recipe(folder, "zero_shot", COOP, **changes)
    prepare_benchmark(made, progress=False)
    run_benchmark(made)
    split = split_file(folder / "data")
    said = split.read_text()
    split.write_text(said.replace("golf ball", "rugby ball"))
    prepare_benchmark(recipe(folder, COOP, data={"prepared": str(folder / "other")}), progress=False)
    split.write_text(said)
    return Finished(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return make(tmp_path_factory.mktemp("finished"))


@contextlib.contextmanager
def other_data(finished: Finished) -> Iterator[None]:
    """Which zero-shot, the first unit, does not mind."""
    with replaced(finished.project / "prepared" / "toys") as kept:
        shutil.copytree(finished.project / "other" / "toys", kept.with_name("toys"))
        yield


@contextlib.contextmanager
def no_weights(finished: Finished) -> Iterator[None]:
    with replaced(finished.project / "model" / "model.safetensors"):
        yield


@contextlib.contextmanager
def damaged_unit(finished: Finished) -> Iterator[None]:
    with flipped(finished.run / "units" / "coop-toys-s2" / "prompts.safetensors"):
        yield


@contextlib.contextmanager
def failing_evaluation(finished: Finished) -> Iterator[None]:
    """Of a unit whose counts are lost, so that it is evaluated again."""

    def fail(*_: Any) -> None:
        raise RuntimeError("the accelerator is gone")

    path = finished.run / "units" / "coop-toys-s1" / "result.json"
    with replaced(path), pytest.MonkeyPatch.context() as patch:
        path.write_text("{")
        patch.setattr("pipeline.clip.benchmark.unit_evaluator.evaluate_group", fail)
        yield


@contextlib.contextmanager
def unreadable_results(finished: Finished) -> Iterator[None]:
    path = finished.run / "results.json"
    with replaced(path):
        path.mkdir()
        yield


@contextlib.contextmanager
def damaged_results_and_unit(finished: Finished) -> Iterator[None]:
    """Results that no call can read, and a unit for which no call can write them anew."""
    with damaged_unit(finished), replaced(finished.run / "results.json"):
        (finished.run / "results.json").write_text("{")
        yield


@contextlib.contextmanager
def full_disk(finished: Finished) -> Iterator[None]:
    with full_disk_of(finished.run):
        yield


# What has to fail under each, so that a fault that is not noticed any more is; the others may do their work.
FAILING: dict[Callable[[Finished], AbstractContextManager[None]], set[str]] = {
    other_data: {"run", "train", "evaluate"},
    no_weights: {"run", "train", "evaluate"},
    damaged_unit: {"run", "train", "evaluate"},
    failing_evaluation: {"run", "evaluate"},
    unreadable_results: {"run", "evaluate", "report"},
    damaged_results_and_unit: {"run", "train", "evaluate", "report"},
    full_disk: {"run", "train", "evaluate", "report"},
}


@pytest.mark.parametrize("wrong", FAILING, ids=lambda wrong: wrong.__name__)
def test_no_verb_that_fails_changes_a_finished_benchmark(
    finished: Finished, wrong: Callable[[Finished], AbstractContextManager[None]]
) -> None:
    assert finished.state()["status"] == "done"
    failed = set()
    with wrong(finished):
        known = finished.content()
        for verb in ("run", "train", "evaluate", "report"):
            done = finished.call(verb)
            after = finished.content()
            if done.exit_code == EXIT_OK:  # these are written by a verb that does its work
                known |= {name: after[name] for name in ("run.json", "report.html")}
            else:
                failed.add(verb)
            changed = [name for name in sorted({*known, *after}) if known.get(name) != after.get(name)]
            assert not changed, f"{verb} (exit code {done.exit_code}): {done.output}"
            assert (finished.state()["status"], finished.state()["units_done"]) == ("done", 3), verb
    assert failed >= FAILING[wrong]


def test_a_finished_benchmark_that_is_run_again_keeps_everything_and_adds_its_seconds(finished: Finished) -> None:
    before, state = finished.content(), finished.state()
    for verb in ("run", "train", "evaluate", "report"):
        done = finished.call(verb)
        assert done.exit_code == EXIT_OK, done.output
    after, now = finished.content(), finished.state()
    # The page names the time and the seconds of run.json.
    measured = re.compile(rb"<dt>(?:updated|seconds)</dt>\s*<dd>[^<]*</dd>")
    for content in (before, after):
        content["report.html"], found = measured.subn(b"", content["report.html"])
        assert found == 2
        del content["run.json"]
    assert after == before
    assert now["timing"]["total_s"] >= state["timing"]["total_s"] > 0
    last = ("updated", "timing")
    assert {**now, **dict.fromkeys(last)} == {**state, **dict.fromkeys(last)}


def test_a_unit_that_is_gone_leaves_its_row_to_an_evaluation_and_is_trained_again_by_a_run(
    finished: Finished, caplog: pytest.LogCaptureFixture
) -> None:
    results = (finished.run / "results.json").read_bytes()
    unit = finished.run / "units" / "coop-toys-s1"
    shutil.rmtree(unit)
    assert finished.call("evaluate").exit_code == EXIT_OK
    assert (finished.run / "results.json").read_bytes() == results
    assert "1 of 3 units not trained" in caplog.text
    assert "keeps the results of coop-toys-s1" in caplog.text
    assert finished.call("run").exit_code == EXIT_OK
    assert (unit / "result.json").is_file()
    assert (finished.run / "results.json").read_bytes() == results
    assert finished.state()["status"] == "done"


def test_the_tracked_benchmark_is_as_finished_as_the_run_folder(finished: Finished) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished.project / 'mlflow.db'}")
    parent = finished.state()["mlflow"]["parent"]
    before = client.get_run(parent)
    assert before.info.status == "FINISHED"
    for wrong in (damaged_unit, failing_evaluation):
        with wrong(finished):
            assert finished.call("evaluate").exit_code != EXIT_OK
        after = client.get_run(parent)
        assert (after.info.status, after.data.metrics) == ("FINISHED", before.data.metrics)
