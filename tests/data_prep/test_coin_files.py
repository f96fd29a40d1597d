"""Which files make up a split in CoIN layout: parts, images under datasets/, and further answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.sources.coin import CoinSplit
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from tests.tiny_clip import picture


def _write(root: Path, path: str, content: Any) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(json.dumps(content), "utf-8")


def _question(id_: str | int, **fields: Any) -> dict[str, Any]:
    return {"question_id": id_, "text": f"question {id_}?", "answer": "yes", **fields}


def _samples(root: Path, **settings: Any) -> list[Sample]:
    records = list(CoinSplit(root, "T", "test", **settings).records())
    assert all(isinstance(record, Sample) for record in records), records
    return [record for record in records if isinstance(record, Sample)]


def _ids(root: Path, **settings: Any) -> list[str]:
    return [sample.id for sample in _samples(root, **settings)]


def test_numbered_parts_follow_the_first_file_in_the_order_of_their_numbers(tmp_path):
    for name, id_ in (("test", "a"), ("test_2", "b"), ("test_10", "c"), ("test_note", "no"), ("train_1", "no")):
        _write(tmp_path, f"instructions/T/{name}.json", [_question(id_)])
    assert _ids(tmp_path) == ["a", "b", "c"]


def test_a_split_may_consist_of_parts_alone(tmp_path):
    for number in range(3):
        _write(tmp_path, f"instructions/T/val-0000{number}-of-00003.json", [_question(number)])
    assert _ids(tmp_path) == ["0", "1", "2"]


def test_the_only_file_that_starts_as_the_split_is_taken(tmp_path):
    _write(tmp_path, "instructions/T/test_brief_4w.json", [_question("a")])
    assert _ids(tmp_path) == ["a"]


def test_several_files_that_could_be_meant_have_to_be_named(tmp_path):
    for name in ("test_brief", "test_long"):
        _write(tmp_path, f"instructions/T/{name}.json", [_question(name)])
    with pytest.raises(UserError, match=r"could be any of test_brief\.json, test_long\.json .* task's test_files"):
        _ids(tmp_path)
    assert _ids(tmp_path, files=("test_long.json", "test_brief.json")) == ["test_long", "test_brief"]


def test_a_named_file_that_is_missing_names_the_nearest(tmp_path):
    _write(tmp_path, "instructions/T/test.json", [_question("a")])
    with pytest.raises(UserError, match=r"no file 'tset\.json'; it has test\.json\. Did you mean 'test\.json'\?"):
        _ids(tmp_path, files=("tset.json",))


def test_an_id_that_occurs_in_two_files_is_named_with_both(tmp_path):
    for name in ("test", "test_1"):
        _write(tmp_path, f"instructions/T/{name}.json", [_question("a")])
    _, record = CoinSplit(tmp_path, "T", "test").records()
    assert not isinstance(record, Sample)
    assert "test_1.json, entry 0 (id 'a'): its id is that of" in record.sentence()
    assert "test.json, entry 0 (id 'a');" in record.sentence()


def test_images_may_lie_below_datasets_as_in_coin(tmp_path):
    (tmp_path / "datasets" / "COCO2014").mkdir(parents=True)
    (tmp_path / "datasets" / "COCO2014" / "x.png").write_bytes(picture(3))
    _write(tmp_path, "instructions/T/test.json", [_question("a", image="./COCO2014/x.png")])
    assert [sample.image for sample in _samples(tmp_path)] == [picture(3)]


def _bare(id_: str | int) -> dict[str, Any]:
    return {"question_id": id_, "text": f"question {id_}?"}


TEXTVQA = {"data": [{"question_id": 7, "answers": ["stop", "halt", "halt"]}]}
VQAV2 = {"annotations": [{"question_id": 7, "answers": [{"answer": "stop"}, {"answer": "halt"}, {"answer": "halt"}]}]}
VIZWIZ = [{"image": "x.jpg", "question": "?", "answers": [{"answer": a} for a in ("stop", "halt", "halt")]}]
COCO = {
    "images": [{"id": 99, "file_name": "x.jpg"}],
    "annotations": [{"image_id": 99, "caption": caption} for caption in ("stop", "halt", "halt")],
}


@pytest.mark.parametrize("content", [TEXTVQA, VQAV2, VIZWIZ, COCO])
def test_a_test_question_gets_the_answers_of_all_annotators(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(picture(3, kind="JPEG"))
    _write(tmp_path, "instructions/T/test.json", [_question(7, image="x.jpg"), _question("8", answer="own")])
    _write(tmp_path, "more/answers.json", content)
    first, second = _samples(tmp_path, annotations="more/answers.json")
    assert (first.answer, first.meta) == ("yes", {"answers": ["stop", "halt", "halt"]})
    assert (second.answer, second.meta) == ("own", {})


def test_a_question_without_an_answer_gets_the_one_most_annotators_gave(tmp_path):
    _write(tmp_path, "instructions/T/test.json", [_bare(7)])
    _write(tmp_path, "more/answers.json", TEXTVQA)
    assert [sample.answer for sample in _samples(tmp_path, annotations="more/answers.json")] == ["halt"]


def test_scienceqa_problems_give_choices_and_the_letter_of_the_answer(tmp_path):
    _write(tmp_path, "instructions/T/test.json", [_bare("7")])
    _write(tmp_path, "datasets/T/problems.json", {"7": {"choices": ["iron", "gold"], "answer": 1, "hint": ""}})
    (sample,) = _samples(tmp_path)
    assert (sample.answer, sample.meta) == ("B", {"options": ["iron", "gold"]})


@pytest.mark.parametrize(("task", "found"), [("TextVQA", True), ("Text-VQA", True), ("GQA", False), ("VizWiz", False)])
def test_an_annotation_file_in_the_folder_of_all_tasks_is_its_own_tasks_alone(tmp_path, task, found):
    _write(tmp_path, f"instructions/{task}/val.json", [_question(7)])
    _write(tmp_path, "datasets/TextVQA_0.5.1_val.json", TEXTVQA)
    (sample,) = CoinSplit(tmp_path, task, "test").records()
    assert isinstance(sample, Sample) and ("answers" in sample.meta) == found


@pytest.mark.parametrize("folder", ["instructions/T", "datasets/T", "T"])
def test_the_benchmarks_own_annotation_files_are_found(tmp_path, folder):
    _write(tmp_path, "instructions/T/val.json", [_question(7)])
    _write(tmp_path, f"{folder}/TextVQA_0.5.1_val.json", TEXTVQA)
    assert len(_samples(tmp_path)[0].meta["answers"]) == 3


def test_annotations_do_not_reach_the_training_split(tmp_path):
    _write(tmp_path, "instructions/T/train.json", [_bare(7)])
    _write(tmp_path, "instructions/T/TextVQA_0.5.1_val.json", TEXTVQA)
    (record,) = CoinSplit(tmp_path, "T", "train").records()
    assert not isinstance(record, Sample) and "answer is missing" in record.reason


@pytest.mark.parametrize("content", [[{"question_id": 7}], {"data": 3}, [1], {"7": {}}, "text"])
def test_annotations_of_no_known_form_are_refused(tmp_path, content):
    _write(tmp_path, "instructions/T/test.json", [_question(7)])
    _write(tmp_path, "more.json", content)
    with pytest.raises(UserError, match=r"The annotations .*more\.json cannot be read .* expected answers by"):
        _samples(tmp_path, annotations="more.json")


def test_named_annotations_that_are_missing_are_refused(tmp_path):
    _write(tmp_path, "instructions/T/test.json", [_question(7)])
    with pytest.raises(UserError, match=r"names the annotations more\.json, and .*more\.json does not exist"):
        _samples(tmp_path, annotations="more.json")
