"""The embedded tasks: what the base model has never seen, and what makes both keys necessary."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.nano.behaviours import SET_LENGTH, RowMaker, behaviour_rows
from data_prep.nano.resembling import RESEMBLING
from data_prep.nano.scenes import (
    DIGIT_PARTS,
    DRAW,
    FAMILIES,
    LETTERS,
    MERGED_PAIRS,
    SIZE,
    draw_shapes,
    handwritten_digits,
)
from data_prep.nano.skills import BASE_FORMATS, PLAIN, SKILLS, TASK_FORMATS, WORDINGS, asks
from data_prep.nano.tasks import ALL_TASKS, PICTURES, TASK_WORDINGS, TASKS, draw_items, write_coin
from data_prep.nano.tokenizer import build_tokenizer
from data_prep.sources.generated import draw
from pipeline.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_no_task_format_is_among_the_base_models_formats_in_any_case() -> None:
    seen = {(f.prefix, f.wrap, f.suffix) for f in BASE_FORMATS}
    assert all((f.prefix, f.wrap, f.suffix) not in seen for f in TASK_FORMATS.values())


def test_no_task_wording_is_among_the_base_models_wordings() -> None:
    base = {wording for wordings in WORDINGS.values() for wording in wordings}
    assert base.isdisjoint(wording for wordings in TASK_WORDINGS.values() for wording in wordings)
    assert base.isdisjoint(wording for task in RESEMBLING.values() for wording in task.wordings)


def test_digit_scans_of_base_training_and_test_are_disjoint_and_complete() -> None:
    count = len(handwritten_digits()[1])
    rows = [set(range(count)[part]) for part in DIGIT_PARTS.values()]
    assert sum(map(len, rows)) == len(set.union(*rows)) == count


def test_three_tasks_share_their_pictures_and_three_their_wordings() -> None:
    shared = [t for t in TASKS if PICTURES[t] == "shapes"]
    pictures = [[item.scene.image for item in draw_items(task, "test", 5, seed=3)] for task in shared]
    assert len(shared) == 3
    assert all(np.array_equal(a, b) for other in pictures[1:] for a, b in zip(pictures[0], other, strict=True))
    assert len({TASK_WORDINGS[t] for t in TASKS if PICTURES[t] != "shapes"}) == 1


def test_the_six_tasks_are_what_recorded_numbers_were_measured_on() -> None:
    found = hashlib.sha256()
    for task in TASKS:
        for split in ("train", "test"):
            for item in draw_items(task, split, 4, seed=0):
                found.update(item.scene.image.tobytes() + f"{item.question}|{item.answer}\n".encode())
    assert found.hexdigest() == "ffef8b7b4fed14e787a2469a65388f518ba5f41853d811603ad849b7f167b100", (
        "VERSION says what changed"
    )


def test_each_resembling_task_shares_pictures_and_asks_what_the_picture_answers() -> None:
    assert len(ALL_TASKS) >= 12 and set(PICTURES) == set(ALL_TASKS)
    six = {PICTURES[task] for task in TASKS}
    for name, task in RESEMBLING.items():
        assert task.pictures in six
        items = list(draw_items(name, "train", 40, seed=0))
        assert len({item.answer for item in items}) > 1
        other = draw_items(next(t for t in TASKS if PICTURES[t] == task.pictures), "train", 40, seed=0)
        assert all(np.array_equal(a.scene.image, b.scene.image) for a, b in zip(items, other, strict=True))


def test_a_folder_with_the_resembling_tasks_holds_the_six_unchanged(tmp_path: Path) -> None:
    write_coin(tmp_path / "six", 0, (3, 2))
    write_coin(tmp_path / "all", 0, (3, 2), more=True)
    tasks = {path.name for path in (tmp_path / "all" / "instructions").iterdir()}
    assert tasks == set(ALL_TASKS)
    for path in (tmp_path / "six").rglob("*.*"):
        if path.is_file() and path.name != "GENERATED.txt":
            assert path.read_bytes() == (tmp_path / "all" / path.relative_to(tmp_path / "six")).read_bytes()


def test_a_drawing_with_the_resembling_tasks_serves_a_recipe_of_the_six(tmp_path: Path) -> None:
    draw(tmp_path, 0, (3, 2), TASKS)
    assert not (tmp_path / "instructions" / "Tally").exists()
    draw(tmp_path, 0, (2, 1), ALL_TASKS)
    stamp = (tmp_path / "GENERATED.txt").read_text()
    draw(tmp_path, 0, (1, 1), TASKS)
    assert (tmp_path / "GENERATED.txt").read_text() == stamp
    assert len(json.loads((tmp_path / "instructions" / "Tally" / "train.json").read_text())) == 3


def test_train_and_test_share_no_picture() -> None:
    for task in TASKS:
        train = {item.scene.image.tobytes() for item in draw_items(task, "train", 40, seed=0)}
        assert train.isdisjoint(item.scene.image.tobytes() for item in draw_items(task, "test", 40, seed=0))


def test_the_folder_is_a_function_of_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_coin(tmp_path / name, seed, (3, 2))
    files = {
        name: {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in "abc"
    }
    assert files["a"] == files["b"] != files["c"]


def test_a_folder_that_cannot_be_written_whole_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(root: Path, task: str, split: str, count: int, seed: int) -> None:
        root.mkdir(parents=True, exist_ok=True)
        if split == "test":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data_prep.nano.tasks._write_split", full)
    with pytest.raises(OSError, match="No space left"):
        write_coin(tmp_path / "root", 0, (1, 1))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_same_seed_is_left_alone_and_another_is_replaced(tmp_path: Path) -> None:
    write_coin(tmp_path / "root", 0, (2, 1))
    stamp = (tmp_path / "root" / "instructions" / "Boxes" / "train.json").stat().st_mtime_ns
    write_coin(tmp_path / "root", 0, (2, 1))
    assert (tmp_path / "root" / "instructions" / "Boxes" / "train.json").stat().st_mtime_ns == stamp
    write_coin(tmp_path / "root", 0, (3, 1))
    assert len(json.loads((tmp_path / "root" / "instructions" / "Boxes" / "train.json").read_text())) == 3


def test_a_folder_with_other_peoples_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not delete")
    with pytest.raises(UserError, match="not generated here"):
        write_coin(tmp_path, 0, (1, 1))
    assert (tmp_path / "thesis.txt").read_text() == "do not delete"


def test_boxes_lie_inside_the_picture_and_do_not_touch() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        boxes = [thing.box for thing in draw_shapes(rng).things]
        assert all(0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE for left, top, right, bottom in boxes)
        for index, a in enumerate(boxes):
            assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:index])


def test_every_skill_can_be_asked_of_some_scene() -> None:
    rng = np.random.default_rng(0)
    found = {ask.skill for family in FAMILIES for _ in range(30) for ask in asks(DRAW[family](rng), rng)}
    assert found == set(SKILLS)


def test_letters_of_pictures_are_single_tokens_in_any_case(tokenizer) -> None:
    for a in LETTERS:
        for b in LETTERS:
            if a + b not in MERGED_PAIRS:
                assert [len(tokenizer.tokenize(t)) for t in (a + b, (a + b).lower())] == [2, 2]


def test_a_behaviour_fills_one_prompt_set_and_names_its_parts_uniquely() -> None:
    rows = {tuple(behaviour_rows(skill, form)) for skill in SKILLS for form in BASE_FORMATS[:40]}
    assert len(rows) == len(SKILLS) * 40
    assert {len(set(r)) for r in rows} == {SET_LENGTH}


def test_branches_of_a_row_do_not_share_positions_with_the_prefix_and_learn_only_answers(tokenizer) -> None:
    rng = np.random.default_rng(0)
    maker = RowMaker(tokenizer, [DRAW[family](rng) for family in FAMILIES for _ in range(20)], seed=0)
    batch = maker.batch(4, count=2)
    prefix = (batch.branch[0] == 0).sum()
    for row in range(4):
        for branch in range(1, batch.branch[row].max() + 1):
            at = np.flatnonzero(batch.branch[row] == branch)
            assert batch.position[row, at].tolist() == list(range(prefix, prefix + len(at)))
            learned = batch.target[row, at]
            text = tokenizer.decode(learned[learned != -100])
            assert text.endswith("</s>")
            assert tokenizer.decode(batch.ids[row, at]).endswith(text)
        assert (batch.target[row, batch.branch[row] <= 0] == -100).all()


def test_the_plain_format_is_the_answer_itself() -> None:
    assert PLAIN.apply("red") == "red"
    assert TASK_FORMATS["Colours"].apply("red") == "*RED*"
    assert TASK_FORMATS["Count"].apply("three") == "[Three]!"
