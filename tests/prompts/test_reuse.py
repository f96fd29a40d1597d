"""An answer is taken from an earlier evaluation if it is one to the same question by the same sets, and else never."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import evaluate
from pipeline.data.collate import Examples, StageData
from pipeline.distributed import init_world
from pipeline.evaluate import Test, evaluate_task
from pipeline.prompts.pool import PromptPool
from tests.train.worlds import make_pool, make_samples


class Generated:
    """Stands in for the model: counts the questions and answers with the sets' values, so versions differ."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[int] = []
        monkeypatch.setattr(evaluate, "generate_answers", self.generate)
        monkeypatch.setattr(evaluate, "_share_of", lambda missing, *_: missing)

    def generate(self, lmm: Any, examples: Examples, indices: list[int], selected: Any, sets: Any, *_: Any) -> Any:
        self.asked += indices
        return {index: f"{sets[selected[index]].sum():.3f}" for index in indices}


def run(folder: Path, number: int, pool: PromptPool, chosen: list[list[int]], test: Test | None = None) -> None:
    """Evaluate after stage `number`, with answers of the stages before."""
    samples, keys = make_samples(len(chosen))
    test = test or Test("a", "exact", 8, StageData([(samples, keys, None)]))
    selected, scores = torch.tensor(chosen), torch.zeros(len(chosen), len(pool))
    earlier = [folder / str(before) for before in range(number)]
    lmm: Any = dataclasses.make_dataclass("Model", ["conversation"])(None)
    evaluate_task(lambda: lmm, test, pool, selected, scores, init_world(), folder / str(number), 4, earlier)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> Generated:
    return Generated(monkeypatch)


def test_only_questions_with_other_sets_are_asked_again(generated: Generated, tmp_path: Path) -> None:
    run(tmp_path, 0, make_pool(1), [[0], [0], [0]])
    assert sorted(generated.asked) == [0, 1, 2]
    run(tmp_path, 1, make_pool(2), [[0], [1], [0]])
    assert sorted(generated.asked) == [0, 1, 1, 2]
    run(tmp_path, 2, make_pool(3), [[0], [1], [2]])  # the second's answer is that of the stage before
    assert sorted(generated.asked) == [0, 1, 1, 2, 2]


def test_a_set_of_the_same_name_with_other_values_is_another_set(generated: Generated, tmp_path: Path) -> None:
    run(tmp_path, 0, make_pool(1), [[0], [0]])
    changed = make_pool(1)
    changed.prompts[0, 0, 0] += 1e-6
    run(tmp_path, 1, changed, [[0], [0]])
    assert generated.asked == [0, 1, 0, 1]


def test_the_order_of_the_sets_makes_another_answer(generated: Generated, tmp_path: Path) -> None:
    run(tmp_path, 0, make_pool(2), [[0, 1]])
    run(tmp_path, 1, make_pool(2), [[1, 0]])
    assert generated.asked == [0, 0]


@pytest.mark.parametrize("change", ["data", "max_new_tokens", "insertion"])
def test_answers_made_with_other_data_or_settings_are_left_alone(
    generated: Generated, tmp_path: Path, change: str
) -> None:
    run(tmp_path, 0, make_pool(1), [[0]])
    path = tmp_path / "0" / "a.score.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "made_with": {**told["made_with"], change: "another"}}))
    run(tmp_path, 1, make_pool(1), [[0]])
    assert generated.asked == [0, 0]


def test_answers_of_a_run_that_does_not_say_what_they_were_made_with_are_used(
    generated: Generated, tmp_path: Path
) -> None:
    run(tmp_path, 0, make_pool(1), [[0]])
    path = tmp_path / "0" / "a.score.json"
    told = json.loads(path.read_text())
    del told["made_with"]
    path.write_text(json.dumps(told))
    run(tmp_path, 1, make_pool(1), [[0]])
    assert generated.asked == [0]


def test_a_fingerprint_follows_the_values_it_was_taken_of() -> None:
    pool = make_pool(2)
    before = pool.fingerprint(1)
    assert pool.fingerprint(1) == before
    pool.prompts[1] += 1
    assert pool.fingerprint(1) != before
    assert pool.fingerprint(0) == make_pool(2).fingerprint(0)
