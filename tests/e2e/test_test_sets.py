"""Test sets are read by who scores answers and by nobody else: choices are made with held-out training samples."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.commands import app
from pipeline.config.recipe import Recipe
from pipeline.data.shards import IndexedShards
from pipeline.errors import EXIT_OK
from pipeline.ranks.world import init_world
from pipeline.sequence.data import open_data
from pipeline.sequence.run import run_sequence
from tests.e2e.own_task import make_mine

pytestmark = pytest.mark.e2e

# Who may look at a test sample: the answers and their scores, the score of the constant answer, the pictures on the
# report's page, and `prepare`, which writes and verifies them.
SCORING = {
    *("pipeline.sequence.evaluation", "pipeline.sequence.evaluate", "pipeline.sequence.answers"),
    *("pipeline.sequence.majority", "pipeline.sequence.matrix", "pipeline.sequence.test_set"),
    *("pipeline.sequence.confusion", "pipeline.sequence.told"),
    *("pipeline.prompts.generation", "pipeline.metrics.blind", "pipeline.report.predictions"),
    "pipeline.data.texts",  # questions and answers of a test set, read by threads; evaluations alone ask for them
    "pipeline.planning.sample_lengths",  # whether a test sample fits into the model; nothing is set by it
}
PREPARING = {"data_prep.prepare", "data_prep.shards", "data_prep.keys", "data_prep.verify", "data_prep.split"}
OPENING = {"pipeline.sequence.data"}  # of a run, whose evaluation it is handed to


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The modules that read samples or keys of a test split: of each read the outermost that is not of the reader's."""
    seen: set[str] = set()

    def spied(name: str) -> None:
        true = getattr(IndexedShards, name)

        def spy(shards: IndexedShards, *arguments: object, **named: object) -> object:
            if shards.folder.name == "test":
                seen.add(reader())
            return true(shards, *arguments, **named)

        monkeypatch.setattr(IndexedShards, name, spy)

    for name in ("__getitem__", "text", "keys", "image_bytes", "checksums"):
        spied(name)
    yield seen


def reader() -> str:
    """The innermost module that is not of pipeline.data; in a thread of a reader, that reader's."""
    frame, name = sys._getframe(2), "?"
    while True:
        module = frame.f_globals.get("__name__", "?")
        if module.startswith(("pipeline.", "data_prep.")):
            name = module
            if not module.startswith("pipeline.data."):
                return name
        if frame.f_back is None:
            return name
        frame = frame.f_back


def invoked(*arguments: str) -> dict[str, object]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == EXIT_OK, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_only_scoring_reads_the_test_sets(make: Callable[..., Recipe], tmp_path: Path, readers: set[str]) -> None:
    recipe = make(tasks=2, data__validation_share=0.5)
    run_sequence(recipe)
    assert "pipeline.sequence.data" in readers and readers <= SCORING | OPENING
    run = recipe.run_path
    make_mine(tmp_path)
    add = ("add", str(run), "Mine", "--root", str(tmp_path / "own"))
    readers.clear()
    invoked(*add, "--dry-run")
    assert readers <= PREPARING  # its own test set, which it prepares
    readers.clear()
    invoked(*add, "--dry-run")
    invoked("export", str(run), str(tmp_path / "adapter"))
    assert readers <= PREPARING
    invoked(*add)
    assert readers <= PREPARING | SCORING | OPENING


def test_what_chooses_is_given_no_test_set(make: Callable[..., Recipe]) -> None:
    data = open_data(make(tasks=1), init_world())
    with pytest.raises(RuntimeError, match="for scoring alone"):
        _ = data.tests
