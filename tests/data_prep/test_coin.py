from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.bad_records import BadRecord
from data_prep.sources.coin import CoinSplit, read_task
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from tests.tiny_clip import picture, save_coin


def _root(tmp_path: Path, entries: Any, name: str = "train.json") -> Path:
    folder = tmp_path / "instructions" / "Task"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(entries if isinstance(entries, str) else json.dumps(entries), "utf-8")
    (tmp_path / "a.png").write_bytes(picture(1))
    return tmp_path


def _train(**changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog"}]
    return {"id": "x", "image": "a.png", "conversations": turns, **changes}


def _test(**changes: Any) -> dict[str, Any]:
    return {"question_id": 7, "image": "a.png", "text": "What?", "answer": "A dog", **changes}


def _one(root: Path, split: str = "train") -> Sample:
    (sample,) = read_task(root, "Task", split)
    return sample


def test_a_training_entry_becomes_question_and_answer_without_the_image_tag(tmp_path):
    assert _one(_root(tmp_path, [_train()])) == Sample("x", picture(1), "What?", "A dog", {})


def test_later_turns_are_kept_in_meta(tmp_path):
    more = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "A cat"}]
    sample = _one(_root(tmp_path, [_train(conversations=_train()["conversations"] + more)]))
    assert (sample.question, sample.answer) == ("What?", "A dog")
    assert sample.meta == {"turns": [{"question": "And?", "answer": "A cat"}]}


def test_a_test_entry_keeps_its_other_fields_in_meta(tmp_path):
    sample = _one(_root(tmp_path, [_test(answer_bbox="[0, 1]", size=[3, 4])], "test.json"), "test")
    assert sample == Sample("7", picture(1), "What?", "A dog", {"answer_bbox": "[0, 1]", "size": [3, 4]})


def test_the_test_split_may_be_called_val(tmp_path):
    assert _one(_root(tmp_path, [_test()], "val.json"), "test").id == "7"


@pytest.mark.parametrize("image", [{}, {"image": None}, {"image": ""}])
def test_an_entry_without_an_image_is_text_only(tmp_path, image):
    entry = _train() | image if image else {k: v for k, v in _train().items() if k != "image"}
    assert _one(_root(tmp_path, [entry])).image is None


def test_repeated_ids_are_told_apart_where_they_are_meant_to_repeat(tmp_path):
    root = _root(tmp_path, [_train(), _train(id="y"), _train(), _train()])
    split = CoinSplit(root, "Task", "train", number_repeated=True)
    assert [record.id for record in split.records() if isinstance(record, Sample)] == ["x", "y", "x#2", "x#3"]


def test_a_bad_record_stands_in_its_place_between_the_samples(tmp_path):
    entries = [_train(), _train(), _train(id="y", image="gone.png"), {"id": "z"}, _train(id="last")]
    first, repeated, gone, bare, last = CoinSplit(_root(tmp_path, entries), "Task", "train").records()
    assert isinstance(first, Sample) and isinstance(last, Sample)
    assert isinstance(repeated, BadRecord) and isinstance(gone, BadRecord) and isinstance(bare, BadRecord)
    assert repeated.record == "entry 1 (id 'x')"
    assert "its id is that of" in repeated.reason
    assert "gone.png does not exist" in gone.reason
    assert bare.sentence().startswith(
        f"{tmp_path}/instructions/Task/train.json, entry 3 (id 'z'): question_id is missing"
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_start_and_limit_cut_the_file_and_workers_keep_its_order(tmp_path, workers):
    root = save_coin(tmp_path, train=20)
    ids = [sample.id for sample in read_task(root, "Shapes", "train", limit=15, start=4, workers=workers)]
    assert ids == [f"Shapes-{n}" for n in range(4, 15)]


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ("[{", r"train\.json is not valid JSON \(.*line 1.*expected an array"),
        ({}, r"train\.json holds dict; expected a JSON array"),
        ([], r"train\.json holds an empty array"),
        ([_train(), "x"], r"train\.json, entry 1: found str, expected an object"),
        ([{"image": "a.png"}], r"entry 0: question_id is missing \(found image\)"),
        ([{**_train(), "id": None}], r"entry 0: id is missing \(found image, conversations\)"),
        ([{**_train(), "id": ["x"]}], r"entry 0: id is list, expected text or a number"),
        ([_train(image=["a.png", "b.png"])], r"entry 0 \(id 'x'\): image is list, expected one path"),
        ([_train(conversations=[])], r"entry 0 \(id 'x'\): conversations is not a list of question and answer pairs"),
        ([_train(conversations=_train()["conversations"][:1])], r"not a list of question and answer pairs"),
        (
            [_train(conversations=_train()["conversations"][::-1])],
            r"entry 0 \(id 'x'\): turn 0 of conversations is not from human",
        ),
        (
            [_train(conversations=[{"from": "system", "value": "hi"}, *_train()["conversations"][1:]])],
            r"entry 0 \(id 'x'\): turn 0 of conversations has the unknown role 'system'",
        ),
        ([_train(conversations=[{"from": "human"}, {"from": "gpt"}])], r"\(id 'x'\): turn 0: value is missing"),
        (
            [_train(conversations=[_train()["conversations"][0], {"from": "gpt", "value": " "}])],
            r"\(id 'x'\): turn 1: its answer is empty",
        ),
        ([{k: v for k, v in _test().items() if k != "answer"}], r"entry 0 \(id '7'\): answer is missing"),
        ([_test(answer="")], r"entry 0 \(id '7'\): its answer is empty"),
        ([_test(text="\ud800")], r"entry 0 \(id '7'\): text holds half a surrogate pair"),
        ([_train(image="gone.png")], r"entry 0 \(id 'x'\): the image .*gone\.png does not exist"),
        (
            [_train(), _train(id="y"), _train()],
            r"entry 2 \(id 'x'\): its id is that of .*train\.json, entry 0 \(id 'x'\); .* data\.repeated_ids to number",
        ),
    ],
)
def test_a_wrong_entry_is_named_with_what_was_expected(tmp_path, entries, sentence):
    with pytest.raises(UserError, match=sentence):
        list(read_task(_root(tmp_path, entries), "Task", "train"))


@pytest.mark.parametrize("damage", [lambda image: image[: len(image) // 2], lambda image: b"not an image"])
def test_an_unreadable_image_is_named(tmp_path, damage):
    root = _root(tmp_path, [_train(), _train(id="y", image="b.png")])
    (root / "b.png").write_bytes(damage(picture(2, size=(200, 200))))
    with pytest.raises(UserError, match=r"train\.json, entry 1 \(id 'y'\): the image .*b\.png cannot be decoded"):
        list(read_task(root, "Task", "train"))


def test_an_unknown_task_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"has no task 'Taks'; it has Task\. Did you mean 'Task'\?"):
        list(read_task(_root(tmp_path, [_train()]), "Taks", "train"))


def test_a_missing_split_and_a_folder_that_is_no_root_say_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"no test file: expected test\.json or val\.json"):
        list(read_task(_root(tmp_path, [_train()]), "Task", "test"))
    with pytest.raises(UserError, match=r"has no folder instructions"):
        list(read_task(tmp_path / "instructions", "Task", "train"))


def test_what_shows_without_decoding_images_is_found_quickly(tmp_path):
    entries = [_train(), _train(id="gone", image="gone.png"), {"id": "bare"}, _train(id="damaged", image="b.png")]
    root = _root(tmp_path, entries)
    (root / "b.png").write_bytes(b"no image")
    bad = list(CoinSplit(root, "Task", "train").unusable())
    assert [record.record for record in bad] == ["entry 1 (id 'gone')", "entry 2 (id 'bare')"]
    assert "gone.png does not exist" in bad[0].reason


def test_the_fingerprint_notices_a_changed_entry_limit_and_image(tmp_path):
    def fingerprint(**settings: Any) -> str:
        return CoinSplit(tmp_path, "Task", "train", **settings).fingerprint()

    root = _root(tmp_path, [_train(), _train(id="y")])
    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(limit=1) != first
    assert fingerprint(number_repeated=True) != first
    (root / "a.png").write_bytes(picture(5, size=(40, 40)))
    changed = fingerprint()
    assert changed != first
    _root(tmp_path, [_train(), _train(id="z")])
    (root / "a.png").write_bytes(picture(5, size=(40, 40)))
    assert fingerprint() != changed


def test_the_fingerprint_notices_an_image_that_appears_and_a_changed_annotation(tmp_path):
    root = _root(tmp_path, [_test(image="late.png")], "test.json")
    first = CoinSplit(root, "Task", "test").fingerprint()
    (root / "late.png").write_bytes(picture(2))
    second = CoinSplit(root, "Task", "test").fingerprint()
    (root / "instructions" / "Task" / "problems.json").write_text(json.dumps({"7": {"answer": "A dog"}}))
    assert len({first, second, CoinSplit(root, "Task", "test").fingerprint()}) == 3
