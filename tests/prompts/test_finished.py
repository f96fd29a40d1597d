"""An evaluation that is finished is neither computed, read nor written again, as long as it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.selection import Selection
from pipeline.data.stage_data import StageData
from pipeline.errors import UserError
from pipeline.sequence import answers
from tests.prompts.test_reuse import Generated, run
from tests.training.worlds import make_pool


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> Generated:
    return Generated(monkeypatch)


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nobody may read predictions or samples."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("something finished was read again")

    monkeypatch.setattr(answers, "known_answers", forbidden)
    monkeypatch.setattr(StageData, "__getitem__", forbidden)
    monkeypatch.setattr(StageData, "text", forbidden)


def test_nothing_of_a_finished_evaluation_is_read_or_written_again(
    generated: Generated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = run(tmp_path, 0, make_pool(1), [[0], [0]])
    before = files(tmp_path / "0")
    forbid(monkeypatch)
    assert run(tmp_path, 0, make_pool(1), [[0], [0]]) == score
    assert files(tmp_path / "0") == before


@pytest.mark.parametrize("change", ["sets", "prototypes", "selection", "order"])
def test_other_sets_are_noticed(generated: Generated, tmp_path: Path, change: str) -> None:
    chosen = [[0, 1], [1, 0]]
    run(tmp_path, 0, make_pool(2), chosen)
    asked = len(generated.asked)
    pool = make_pool(2)
    if change == "sets":
        pool.prompts[0, 0, 0] += 1.0
    elif change == "prototypes":
        pool.prototypes[0, 0] += 1.0
    elif change == "selection":
        chosen = [[0, 1], [0, -1]]
    else:
        chosen = [[1, 0], [0, 1]]
    path = tmp_path / "0" / "a.score.json"
    before = json.loads(path.read_text())["identity"]
    run(tmp_path, 0, pool, chosen)
    assert json.loads(path.read_text())["identity"] != before
    assert (len(generated.asked) > asked) == (
        change != "prototypes"
    )  # which decide who is chosen, not what is answered


@pytest.mark.parametrize("damage", ["changed", "cut off", "gone", "sets gone", "sets cut off"])
def test_what_is_damaged_is_mended(generated: Generated, tmp_path: Path, damage: str) -> None:
    run(tmp_path, 0, make_pool(1), [[0], [0]])
    before = {name: content for name, (_, content) in files(tmp_path / "0").items()}
    path = tmp_path / "0" / ("sets.json" if "sets" in damage else "a.jsonl")
    content = path.read_bytes()
    if "gone" in damage:
        path.unlink()
    else:
        path.write_bytes(content[:-9] if "cut" in damage else content.replace(b'"prediction": "', b'"prediction": "9'))
    run(tmp_path, 0, make_pool(1), [[0], [0]])
    assert {name: content for name, (_, content) in files(tmp_path / "0").items()} == before


def test_answers_outlive_a_metric_that_fails(
    generated: Generated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise UserError("no such package")

    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr("pipeline.sequence.answers.score_task", failing)
        run(tmp_path, 0, make_pool(1), [[0], [0]])
    assert sorted(generated.asked) == [0, 1]
    run(tmp_path, 0, make_pool(1), [[0], [0]])
    assert sorted(generated.asked) == [0, 1]
    assert not list(tmp_path.rglob("*unfinished*"))


def test_an_evaluation_of_an_earlier_version_is_taken_over_without_generating(
    generated: Generated, tmp_path: Path
) -> None:
    run(tmp_path, 0, make_pool(1), [[0], [0]])
    path = tmp_path / "0" / "a.score.json"
    told = json.loads(path.read_text())
    del told["identity"], told["predictions"]
    path.write_text(json.dumps(told))
    run(tmp_path, 0, make_pool(1), [[0], [0]])
    assert len(generated.asked) == 2
    assert "identity" in json.loads(path.read_text())


def test_the_same_selection_has_the_same_identity_however_it_is_stored() -> None:
    pool = make_pool(2)
    test: Any = type("Test", (), {"metric": "exact", "scoring": "fixed", "data": [0, 0], "unanswered": ()})
    numbers = torch.tensor([[0, 1], [1, 0]])
    one = answers.identity_of(test, pool, Selection(numbers), answers.AnswerKey())
    assert one == answers.identity_of(test, pool, Selection(numbers.T.contiguous().T), answers.AnswerKey())
    weighted = Selection(numbers, torch.tensor([[0.2, 0.8], [0.5, 0.5]]))
    assert one != answers.identity_of(test, pool, weighted, answers.AnswerKey())
    # Scores of another router are written with the same answers.
    assert one != answers.identity_of(test, pool, Selection(numbers), answers.AnswerKey(router="ridge"))
