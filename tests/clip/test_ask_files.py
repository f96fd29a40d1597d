"""ask.csv as people and their programs save it: what is read, and what is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.clip.active.ask_files import Question, read_answers, remove_question, write_question
from pipeline.clip.active.sheets import COLUMNS, ROWS, draw_sheets
from pipeline.errors import UserError
from pipeline.runs.layout import ASK, ASK_FOLDER
from tests.clip.people import CLASSES, asked, write

IMAGES = ("a.jpg", "Camera/b, with a comma.png", 'c "quoted".jpg', "ü.jpg")
QUESTION = Question("coop-photos-s1", 1, 3, "photos", CLASSES, IMAGES)
ANSWERS = ["red square", "green square", "-", "blue square"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_question(tmp_path, QUESTION, [Image.new("RGB", (30, 20)) for _ in IMAGES])
    return tmp_path


def filled(run: Path) -> list[dict[str, str]]:
    return [{**row, "label": answer} for row, answer in zip(asked(run), ANSWERS, strict=True)]


def test_it_has_every_image_once_with_its_number_and_no_label(run: Path) -> None:
    assert (run / ASK).read_text().splitlines()[0] == "image,label,number"
    assert [(row["image"], row["label"], row["number"]) for row in asked(run)] == [
        (image, "", str(number)) for number, image in enumerate(IMAGES, start=1)
    ]
    assert Question.read(run) == QUESTION and read_answers(run, QUESTION) == [None] * 4
    remove_question(run)
    assert Question.read(run) is None and not (run / ASK).exists() and not (run / ASK_FOLDER).exists()


@pytest.mark.parametrize("saved", ["plain", "excel", "semicolons", "tabs", "capitals", "columns", "blank lines"])
def test_a_table_as_spreadsheets_save_it_is_read(run: Path, saved: str) -> None:
    rows, path = filled(run), run / ASK
    if saved == "capitals":
        rows = [{**row, "label": f" {row['label'].upper().replace(' ', '_')} "} for row in rows]
    write(
        run, rows if saved != "columns" else rows[::-1], ("number", "label", "image")[:: -1 if saved == "tabs" else 1]
    )
    if saved == "excel":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    if saved in ("semicolons", "tabs"):
        mark = {"semicolons": ";", "tabs": "\t"}[saved]
        quoted = [f'"{row["image"].replace(chr(34), chr(34) * 2)}"{mark}{row["label"]}' for row in rows]
        path.write_text(f"image{mark}label\n" + "\n".join(quoted))
    if saved == "blank lines":
        path.write_text(path.read_text() + "\n\n,,\n")
    assert read_answers(run, QUESTION) == ANSWERS


def test_empty_labels_are_no_answers(run: Path) -> None:
    write(run, [*filled(run)[:2], *asked(run)[2:]])
    assert read_answers(run, QUESTION) == [*ANSWERS[:2], None, None]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda rows: [{**rows[0], "label": "rde square"}, *rows[1:]],
            "line 2 has the class 'rde square'; expected one",
        ),
        (lambda rows: [{**rows[0], "label": "rde square"}, *rows[1:]], "Did you mean 'red square'"),
        (lambda rows: rows[1:], "lacks 1 of the 4 images that were asked for, the first is 'a.jpg'"),
        (
            lambda rows: [*rows, {"image": "b.jpg", "label": "red square"}],
            "line 6 has the image 'b.jpg', which this round",
        ),
        (lambda rows: [*rows, rows[0]], "line 6 has the image 'a.jpg' a second time"),
        (lambda rows: [{**rows[0], "image": "A.jpg"}, *rows[1:]], "Did you mean 'a.jpg'"),
    ],
)
def test_answers_that_cannot_be_used_are_refused_in_one_sentence(run: Path, change: Any, sentence: str) -> None:
    write(run, change(filled(run)))
    with pytest.raises(UserError) as refused:
        read_answers(run, QUESTION)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("image,label\nü.jpg,red square\n".encode("cp1252"), "is not UTF-8"),
        (b'image,label\n"a.jpg,red square\n', "Look for a quote that is not closed"),
        (b"picture,class\na.jpg,red square\n", "names the columns image and label"),
        (b"image,label,label\na.jpg,red square,\n", "names the columns image and label"),
        (b"image,label\nb, with a comma.png,red square\n", "line 2 has 3 fields"),
        (b"", "names the columns image and label"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(run: Path, content: bytes, sentence: str) -> None:
    (run / ASK).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_answers(run, QUESTION)


def test_a_damaged_question_says_what_to_do(run: Path) -> None:
    (run / ASK_FOLDER / "ask.json").write_text("{")
    with pytest.raises(UserError, match="keeps the answers in"):
        Question.read(run)


def test_sheets_have_each_picture_in_its_place(tmp_path: Path) -> None:
    """Picture k is as bright as k; the middle of its place on the sheet says so."""
    count, paths = COLUMNS * ROWS + 2, []
    for number in range(count):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (50, 40), (number * 7, number * 7, number * 7)).save(paths[-1])
    sheets = draw_sheets(paths, tmp_path)
    assert [sheet.name for sheet in sheets] == ["sheet-01.jpg", "sheet-02.jpg"]
    with Image.open(sheets[0]) as sheet:
        places = [(x, y) for y in range(ROWS) for x in range(COLUMNS)]
        width, height = sheet.width / COLUMNS, sheet.height / ROWS
        for number, (x, y) in enumerate(places):
            level = sheet.getpixel((int((x + 0.5) * width), int((y + 0.6) * height)))
            assert abs(level[0] - number * 7) < 6
    with Image.open(sheets[1]) as sheet:
        assert sheet.width < sheet.height * 2
