"""What Windows editors, Excel, pandas and scrapers make of text files is read, or said in one sentence."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from data_prep.bad_records import BadRecord
from data_prep.own_task import NewTask, make_task
from data_prep.sources.annotations import read_annotations
from data_prep.sources.class_folders import ImageSplit, read_class_folders, read_csv
from data_prep.sources.coin import CoinSplit, read_task
from data_prep.sources.split_zhou import read_class_names, read_split_file
from data_prep.sources.text_files import Columns
from pipeline.clip.images.classes import LabelledImage, refuse_one_text
from pipeline.errors import UserError
from tests.tiny_clip import picture

BOM = "\ufeff"


def new_task(photos: Path, content: str | bytes, name: str = "t.csv") -> list[tuple[str, str]]:
    """Questions and answers of the task that a table becomes."""
    table = photos.parent / name
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    make_task(NewTask("Mine", photos.parent / "own"), photos, table)
    found = [s for split in ("train", "test") for s in read_task(photos.parent / "own", "Mine", split)]
    return sorted((sample.question, sample.answer) for sample in found)


def coin(root: Path, entries: Any, split: str = "train", prefix: str = "") -> CoinSplit:
    folder = root / "instructions" / "A"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.json").write_text(prefix + json.dumps(entries), "utf-8")
    return CoinSplit(root, "A", split)


def entry(**changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog"}]
    return {"id": "x", "image": "photos/1.png", "conversations": turns, **changes}


def reason(split: CoinSplit) -> str:
    (record,) = split.records()
    assert isinstance(record, BadRecord), record
    return record.reason


ROWS = [f"{n}.png,q{n},a{n}" for n in range(5)]
READ = [(f"q{n}", f"a{n}") for n in range(5)]


# ---------------------------------------------------------------------- encodings


def test_a_byte_order_mark_is_read_over_everywhere(tmp_path: Path, photos: Path) -> None:
    (sample,) = coin(tmp_path, [entry()], prefix=BOM).records()
    assert not isinstance(sample, BadRecord) and sample.answer == "A dog"
    assert new_task(photos, BOM + "\n".join(["image,question,answer", *ROWS])) == READ
    parts = {"train": [["a.png", 0, "ant"]], "test": [["b.png", 0, "ant"]]}
    (tmp_path / "split.json").write_text(BOM + json.dumps(parts), "utf-8")
    assert read_split_file(tmp_path / "split.json").names() == ["ant"]
    (tmp_path / "classnames.txt").write_text(BOM + "n01 ant\r\nn02 bee\r\n", "utf-8")
    assert read_class_names(tmp_path / "classnames.txt") == {"n01": "ant", "n02": "bee"}
    (tmp_path / "annotations.json").write_text(BOM + json.dumps({"1": {"answer": "four"}}), "utf-8")
    assert read_annotations(tmp_path / "annotations.json").find("1", None) is not None


@pytest.mark.parametrize("read", ["new-task", "csv", "json", "lines"])
def test_an_older_encoding_is_a_sentence_that_names_the_line(tmp_path: Path, photos: Path, read: str) -> None:
    table = "path,class,split\n1.png,k\u00e4fer,train\n".encode("cp1252")
    path = tmp_path / "t.csv"
    path.write_bytes(table)
    readers = {
        "new-task": lambda: new_task(photos, table),
        "csv": lambda: read_csv(path),
        "json": lambda: read_split_file(path),
        "lines": lambda: read_class_names(path),
    }
    with pytest.raises(UserError, match=r"t\.csv, line 2 holds the byte 0xe4, which is not UTF-8"):
        readers[read]()


def test_utf_16_and_spreadsheets_are_named(photos: Path) -> None:
    with pytest.raises(UserError, match="is UTF-16, expected UTF-8"):
        new_task(photos, "\n".join(ROWS).encode("utf-16"))
    (photos / "t.csv").write_bytes(b"PK\x03\x04rest")
    with pytest.raises(UserError, match="is a spreadsheet or an archive, expected text"):
        read_csv(photos / "t.csv")


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\u000b", "\u001c"])
def test_a_line_of_jsonl_ends_at_a_line_feed_only(photos: Path, separator: str) -> None:
    lines = [
        json.dumps({"image": f"{n}.png", "question": f"q{separator}{n}", "answer": "a"}, ensure_ascii=False)
        for n in range(5)
    ]
    if separator < " ":
        lines = [line.replace(f"\\u{ord(separator):04x}", " ") for line in lines]  # JSON has these escaped only
    assert len(new_task(photos, "\r\n".join(lines), "t.jsonl")) == 5


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize("header", ["Image,Question,Answer", "image, question, answer", '" IMAGE ","QUESTION",answer'])
def test_a_header_is_read_whatever_its_capitals_and_blanks(photos: Path, header: str) -> None:
    assert new_task(photos, "\n".join([header, *ROWS])) == READ


@pytest.mark.parametrize("row", ["1.png,In it, which colour?,red", "1.png,which colours?,red, green", "1.png"])
def test_a_row_with_more_or_fewer_fields_than_the_header_is_a_fault(photos: Path, row: str) -> None:
    with pytest.raises(UserError, match=r"line 7 has \d fields, the header has 3; put text that holds a comma"):
        new_task(photos, "\n".join(["image,question,answer", *ROWS, row]))
    assert not (photos.parent / "own").exists()


def test_a_row_of_a_class_table_with_a_comma_too_many_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,class,split\na.png,ant, red,train\n")
    with pytest.raises(UserError, match="line 2 has 4 fields, the header has 3"):
        read_csv(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("image,question,answer,answer\n1.png,q,a,b\n", "has the column answer more than once"),
        ("image,questions,answer\n1.png,q,a\n", "Write question in place of questions"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused(photos: Path, content: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        new_task(photos, content)


@pytest.mark.parametrize(
    "content",
    [
        "image;question;answer\n" + "\n".join(row.replace(",", ";") for row in ROWS),
        "sep=;\nimage;question;answer\n" + "\n".join(row.replace(",", ";") for row in ROWS),
        "image\tquestion\tanswer\n" + "\n".join(row.replace(",", "\t") for row in ROWS),
        "image,question,answer\r" + "\r".join(ROWS),
    ],
)
def test_separators_and_ends_of_lines_are_found(photos: Path, content: str) -> None:
    assert new_task(photos, content) == READ


def test_the_line_of_a_fault_counts_the_line_that_names_the_separator(photos: Path) -> None:
    rows = [row.replace(",", ";") for row in ROWS]
    with pytest.raises(UserError, match=r"line 8 has 2 fields, the header has 3; put text that holds a semicolon"):
        new_task(photos, "\n".join(["sep=;", "image;question;answer", *rows, "1.png;q"]))


@pytest.mark.parametrize("answer", ['["red", "green"]', '{"x": 1}', "true"])
def test_an_answer_that_is_no_single_value_is_a_fault_of_its_line(photos: Path, answer: str) -> None:
    rows = [f'{{"image": "{n}.png", "question": "q{n}", "answer": {answer if n == 2 else n}}}' for n in range(5)]
    with pytest.raises(UserError, match=r"line 3: answer is \w+, expected text or a number"):
        new_task(photos, "\n".join(rows), "t.jsonl")


def test_a_name_that_stands_twice_in_a_record_is_refused(photos: Path) -> None:
    with pytest.raises(UserError, match="line 1 has answer more than once"):
        new_task(photos, '{"image": "1.png", "question": "q", "answer": "a", "Answer": "b"}\n', "t.jsonl")


def test_not_a_number_is_an_empty_cell(tmp_path: Path, photos: Path) -> None:
    rows = [f'{{"image": "{n}.png", "question": "q{n}", "answer": {"NaN" if n == 2 else n}}}' for n in range(5)]
    with pytest.raises(UserError, match="line 3 has no answer"):
        new_task(photos, "\n".join(rows), "t.jsonl")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": float("nan")}]
    assert "turn 1: value is nan" in reason(coin(tmp_path, [entry(conversations=turns)]))
    test = {"question_id": 1, "image": "photos/1.png", "text": "What?", "answer": float("nan")}
    assert "answer is nan" in reason(coin(tmp_path, [test], "test"))
    (tmp_path / "annotations.json").write_text(
        json.dumps([{"question_id": 1, "answers": [float("nan"), None, "four"]}, {"question_id": 2, "answers": [None]}])
    )
    annotations = read_annotations(tmp_path / "annotations.json")
    found, empty = annotations.find("1", None), annotations.find("2", None)
    assert found is not None and found.answers == ["four"]
    assert empty is not None and empty.best_answer() is None


# ---------------------------------------------------------------------- images


@pytest.mark.parametrize(
    "other", [{"images": ["photos/1.png"]}, {"img": "photos/1.png"}, {"Image": "photos/1.png"}, {"foto": "a/1.JPG"}]
)
def test_an_image_under_another_name_is_a_bad_record(tmp_path: Path, other: dict[str, Any]) -> None:
    (name,) = other
    record = {key: value for key, value in entry().items() if key != "image"} | other
    assert f"it has {name} and no image; did you mean image?" in reason(coin(tmp_path, [record]))


@pytest.mark.parametrize(
    ("image", "clause"),
    [
        ("photos\\1.png", "does not exist, but 'photos/1.png' does"),
        ("photos/CAF\u00c9.PNG", r"does not exist, but 'photos/caf\xe9.png' does"),
        (unicodedata.normalize("NFD", "photos/caf\u00e9.png"), r"does not exist, but 'photos/caf\xe9.png' does"),
        ("photos/1.png ", "does not exist, but 'photos/1.png' does"),
        ("photos", "is a folder, expected one image file"),
        ("https://example.org/1.png", "'https://example.org/1.png' is an address; images are not fetched"),
        ("photos/9.png", "photos/9.png does not exist. Put it there or set data.root"),
        ("n" * 300 + ".png", "has a name that no file can have"),
        ("a\0b.png", "has a name that no file can have"),
    ],
)
def test_why_an_image_is_not_found_is_said(tmp_path: Path, photos: Path, image: str, clause: str) -> None:
    (photos / "caf\u00e9.png").write_bytes(picture(9))
    split = coin(tmp_path, [entry(image=image)])
    assert clause in reason(split)
    assert [record.reason for record in split.unusable()] == [reason(split)]


def test_a_new_task_says_why_an_image_is_not_found(photos: Path) -> None:
    with pytest.raises(UserError, match=r"line 7: the image '1\.PNG' does not exist, but '1\.png' does"):
        new_task(photos, "\n".join(["image,question,answer", *ROWS, "1.PNG,q,a"]))


# ---------------------------------------------------------------------- class folders


def test_hidden_files_of_a_mac_are_no_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(picture(1))
            (tmp_path / split / name / "._0.png").write_bytes(b"\0\5\x16\7")
    splits = read_class_folders(tmp_path)
    assert {image.path for image in splits.train} == {"train/cat/0.png", "train/dog/0.png"}


def test_what_is_kept_of_an_undecodable_image_holds_no_memory_address(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    (record,) = ImageSplit((LabelledImage("a.png", 0, "ant"),), tmp_path).records()
    assert isinstance(record, BadRecord) and "no known image format" in record.reason and "0x" not in record.reason


def test_a_phones_heic_photograph_is_named_and_told_how_to_be_saved(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(picture(1))
    (tmp_path / "train" / "cat" / "1.HEIC").write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + b"\0" * 16)
    found = [image for image in read_class_folders(tmp_path).train if image.path.endswith(".HEIC")]
    (record,) = ImageSplit(tuple(found), tmp_path).records()
    assert isinstance(record, BadRecord)
    assert "cannot be decoded (HEIC, as phones save photographs). Save it as JPEG." in record.reason


@pytest.mark.parametrize("other", ["sea lake", "Sea_Lake", "sea  lake"])
def test_two_classes_of_one_text_are_refused(other: str) -> None:
    with pytest.raises(UserError, match=f"the classes 'sea_lake' and '{other}', which are one text to CLIP"):
        refuse_one_text(["forest", "sea_lake", other], "mine")


def test_all_columns_that_lack_are_named_at_once() -> None:
    columns = Columns(("question", "answer"), ("image",), {"image": "My photo"}, "--columns")
    with pytest.raises(UserError) as caught:
        columns.require("shelf.csv", columns.spelled(["My photo", "Ask", "Reply"]))
    complete = "Add 'question', 'answer', or --columns 'image=My photo,question=NAME,answer=NAME'."
    assert str(caught.value).endswith(complete)
