"""An answer is taken from an earlier evaluation if it is one to the same question by the same sets, and else never."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backbones.lmm_processor import settings_fingerprint
from pipeline.config.models import ModelConfig
from pipeline.data.collate import Examples
from pipeline.data.selection import Selection, as_selection
from pipeline.data.stage_data import StageData
from pipeline.errors import Interrupted
from pipeline.hub.pickled import SETTINGS
from pipeline.prompts.generation import Conditions, Modules
from pipeline.prompts.parts.input_rows import RowsEntry
from pipeline.prompts.pool import PromptPool
from pipeline.ranks.world import init_world
from pipeline.sequence import evaluate
from pipeline.sequence.answers import AnswerKey, AnswerStore, Routed, known_answers
from pipeline.sequence.evaluate import Answering, evaluate_task
from pipeline.sequence.test_set import TestSet
from tests import tiny
from tests.training.worlds import make_pool, make_samples


class Generated:
    """Stands in for the model: counts the questions and answers with the sets' values, so versions differ."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[int] = []
        monkeypatch.setattr(evaluate, "generate_answers", self.generate)
        monkeypatch.setattr(evaluate, "_share_of", lambda missing, *_: missing)

    def generate(self, lmm: Any, examples: Examples, indices: list[int], modules: Modules, *_: Any) -> Any:
        self.asked += indices
        sets, numbers = modules.tensors["prompt"], as_selection(modules.selected).numbers
        return {index: f"{sets[numbers[index]].sum():.3f}" for index in indices}


def run(
    folder: Path,
    number: int,
    pool: PromptPool,
    chosen: list[list[int]],
    batch: int = 4,
    go_on: Callable[[], bool] = lambda: True,
    task: str = "a",
    **key: Any,
) -> float:
    """Evaluate after stage `number`, with answers of the stages before."""
    samples, keys = make_samples(len(chosen))
    test = TestSet(task, "exact", 8, StageData([(samples, keys, None)]))
    routed = Routed(Selection(torch.tensor(chosen)), torch.zeros(len(chosen), len(pool)))
    earlier = [folder / str(before) for before in range(number)]
    lmm: Any = dataclasses.make_dataclass("Model", ["conversation"])(None)
    store = AnswerStore(folder / str(number), earlier, AnswerKey(**key))
    answering = Answering(lambda: lmm, batch, RowsEntry("after_bos"), conditions=Conditions(go_on=go_on))
    return evaluate_task(test, pool, lambda: routed, store, answering, init_world())


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


def test_what_another_task_was_answered_with_says_nothing_of_this_one(generated: Generated, tmp_path: Path) -> None:
    for task in ("a", "b"):
        run(tmp_path, 0, make_pool(1), [[0]], task=task)
    other = make_pool(1)
    other.prompts[0, 0, 0] += 1.0
    asked = len(generated.asked)
    for task in ("a", "b"):  # the first of them writes what sets the folder's answers have
        run(tmp_path, 0, other, [[0]], task=task)
    assert len(generated.asked) == asked + 2


def test_lines_that_are_no_predictions_are_not_reused(tmp_path: Path) -> None:
    (tmp_path / "sets.json").write_text("{}")
    (tmp_path / "a.jsonl").write_text("null\n")
    assert known_answers("a", [tmp_path], {}) == {}


def test_an_evaluation_that_is_stopped_keeps_the_answers_that_are_there(
    generated: Generated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(lmm: Any, examples: Any, indices: list[int], *given: Any) -> dict[int, str]:
        return {index: "red" for index in indices if given[-1].go_on()}

    asked = iter([True, True, False])
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="with 2 of 3 answers, which are kept"):
        patch.setattr(evaluate, "generate_answers", half)
        run(tmp_path, 0, make_pool(1), [[0]] * 3, batch=1, go_on=lambda: next(asked))
    assert not (tmp_path / "0" / "a.jsonl").exists()
    run(tmp_path, 0, make_pool(1), [[0]] * 3)
    assert generated.asked == [2]
    assert len((tmp_path / "0" / "a.jsonl").read_text().splitlines()) == 3
    assert not list(tmp_path.rglob("*unfinished*"))


@pytest.mark.parametrize("stops", [True, False])
def test_ranks_ask_equally_often_whether_to_stop_however_many_batches_they_have(stops: bool) -> None:
    asked = []
    for batches in (4, 1, 0):
        answers = [True, True, not stops, True]
        rounds = evaluate._Rounds(4, lambda answers=answers: answers.pop(0))  # type: ignore[misc]
        for _ in range(batches):
            if not rounds.go_on():
                break
        rounds.finish()
        asked.append((4 - len(answers), rounds.stopped))
    assert asked == [(3 if stops else 4, stops)] * 3


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


def test_answers_of_another_model_or_with_other_files_beside_it_are_left_alone(
    generated: Generated, tmp_path: Path
) -> None:
    model = {"base_model": "one", "model_files": "one"}
    run(tmp_path, 0, make_pool(1), [[0]])  # evaluated before this was noted: trusted
    run(tmp_path, 1, make_pool(1), [[0]], made_by=model)
    assert generated.asked == [0]
    run(tmp_path / "other", 0, make_pool(1), [[0]], made_by=model)
    run(tmp_path / "other", 1, make_pool(1), [[0]], made_by=model)
    assert generated.asked == [0, 0]
    for number, name in enumerate(model, start=2):
        run(tmp_path / "other", 0, make_pool(1), [[0]], made_by={**model, name: str(number)})
    assert generated.asked == [0, 0, 0, 0]


def test_what_stands_beside_the_weights_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    folder = tiny.save_llava(tmp_path / "llava")
    config = ModelConfig(path=str(folder))
    seen = {settings_fingerprint(config)}
    for name in ("chat_template.jinja", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text((path.read_text() if path.is_file() else "{}") + " ")
        seen.add(settings_fingerprint(config))
    assert len(seen) == 5
    (folder / "README.md").write_text("words")
    assert settings_fingerprint(config) in seen


def test_a_penalty_for_repetition_counts_where_it_is_not_the_checkpoints_own(tmp_path: Path) -> None:
    folder = tiny.save_llava(tmp_path / "llava")
    config = ModelConfig(path=str(folder))
    assert settings_fingerprint(config, 1.0) == settings_fingerprint(config) != settings_fingerprint(config, 1.1)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.05}))
    assert settings_fingerprint(config, 1.05) == settings_fingerprint(config) != settings_fingerprint(config, 1.0)


def _fingerprint_of_padded_batches(folder: Path, penalty: float | str = "checkpoint") -> str:
    """`settings_fingerprint` as it was while answers with a penalty depended on the padding of their rows."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SETTINGS for path in folder.glob(pattern)}):
        if path.name != "config.json":
            content = path.read_bytes()
            digest.update(f"{path.name}:{len(content)}:".encode() + content)
    if penalty != "checkpoint":
        digest.update(f"repetition_penalty:{penalty}".encode())
    return digest.hexdigest()


def test_kept_answers_are_not_reused_where_a_penalty_made_them_depend_on_padding(tmp_path: Path) -> None:
    folder = tiny.save_llava(tmp_path / "llava")
    config = ModelConfig(path=str(folder))
    none = _fingerprint_of_padded_batches(folder)
    assert settings_fingerprint(config) == settings_fingerprint(config, 1.0) == none
    assert settings_fingerprint(config, 1.1) != _fingerprint_of_padded_batches(folder, 1.1)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.05}))
    assert settings_fingerprint(config) != _fingerprint_of_padded_batches(folder)
    assert settings_fingerprint(config, 1.1) != _fingerprint_of_padded_batches(folder, 1.1)
    assert settings_fingerprint(config, 1.0) == _fingerprint_of_padded_batches(folder, 1.0)


def test_a_fingerprint_follows_the_values_it_was_taken_of() -> None:
    pool = make_pool(2)
    before = pool.fingerprint(1)
    assert pool.fingerprint(1) == before
    pool.prompts[1] += 1
    assert pool.fingerprint(1) != before
    assert pool.fingerprint(0) == make_pool(2).fingerprint(0)
