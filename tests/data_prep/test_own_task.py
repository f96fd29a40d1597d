"""A folder of images and a table become a task; what is wrong with the table is said line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from data_prep.answer_kinds import KINDS, kind_of
from data_prep.own_task import NewTask, make_task
from data_prep.sources.coin import read_task
from pipeline.cli.commands import app
from pipeline.errors import EXIT_OK, UserError
from tests.tiny_clip import picture

TABLE = ["image,question,answer", *(f"deep/{n % 5}.png,which number is {n}?,number {n}" for n in range(10))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for number in range(5):
        (tmp_path / "photos" / "deep" / f"{number}.png").write_bytes(picture(number))
    return tmp_path


def make(folder: Path, lines: list[str], name: str = "samples.csv", **options: Any) -> dict[str, Any]:
    (folder / name).write_text("\n".join(lines))
    return make_task(NewTask("Mine", folder / "own", **options), folder / "photos", folder / name)


def test_a_csv_table_becomes_a_task_that_the_pipeline_reads(folder: Path) -> None:
    made = make(folder, TABLE, test_share=0.3)
    samples = {split: list(read_task(folder / "own", "Mine", split)) for split in ("train", "test")}
    assert {split: len(found) for split, found in samples.items()} == {"train": made["train"], "test": made["test"]}
    assert made["train"] + made["test"] == 10
    assert {s.question for found in samples.values() for s in found} == {f"which number is {n}?" for n in range(10)}
    assert json.loads((folder / "own" / "instructions" / "Mine" / "task.json").read_text())["metric"] == "exact_ci"


def test_samples_on_one_image_stay_in_one_split(folder: Path) -> None:
    (folder / "photos" / "copy.png").write_bytes(picture(1))  # the same picture under another name
    make(folder, [*TABLE, "copy.png,and this?,number"], test_share=0.5)
    shown = {s: {x.image for x in read_task(folder / "own", "Mine", s)} for s in ("train", "test")}
    assert not shown["train"] & shown["test"]


def test_a_jsonl_table_may_have_questions_without_image(folder: Path) -> None:
    lines = [json.dumps({"question": f"what is {n} + 1?", "answer": n + 1}) for n in range(6)]
    make(folder, lines, "samples.jsonl")
    assert all(sample.image is None for sample in read_task(folder / "own", "Mine", "train"))


def test_the_sheet_shows_ten_samples(folder: Path) -> None:
    with Image.open(make(folder, [*TABLE, "deep/1.png,price in $ or $?,$3"])["sheet"]) as sheet:
        assert sheet.width > 1000 and sheet.height > 500


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("is it red?", "Yes.", "yes or no"),
        ("which one? A. cat B. dog", "B", "letter of a choice"),
        ("which one? (a) cat (b) dog", "(b)", "letter of a choice"),
        ("which letter is it?", "B", "open answer"),
        ("is a cat there? answer a word.", "a", "open answer"),
        ("how many?", "12", "number"),
        ("what is it?", "no idea", "open answer"),
    ],
)
def test_the_kind_of_a_question_follows_from_its_answer(question: str, answer: str, kind: str) -> None:
    assert kind_of(question, answer) == kind


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path | None, str, str]]:
    """The samples that the sheet would show; it is not drawn."""
    drawn: list[tuple[Path | None, str, str]] = []

    def draw(samples: list[tuple[Path | None, str, str]], target: Path) -> Path:
        drawn.extend(samples)
        return target

    monkeypatch.setattr("data_prep.sheet.draw_sheet", draw)
    return drawn


@pytest.mark.parametrize("period", [2, 4, 5, 8])
def test_a_table_that_lists_its_questions_in_turn_has_several_of_them_on_the_sheet(
    folder: Path, drawn: list[tuple[Path | None, str, str]], period: int
) -> None:
    make(folder, [TABLE[0], *(f"deep/{n // period % 5}.png,question {n % period},a" for n in range(80))])
    assert len(drawn) == 10 and len({question for _, question, _ in drawn}) > 1


@pytest.mark.parametrize("lines", [5, 9, 10, 11, 19])
def test_a_short_table_is_shown_as_far_as_the_sheet_has_room(
    folder: Path, drawn: list[tuple[Path | None, str, str]], lines: int
) -> None:
    make(folder, [TABLE[0], *(f"deep/{n % 2}.png,question {n},a" for n in range(lines))])
    assert len({question for _, question, _ in drawn}) == len(drawn) == min(lines, 10)


def test_the_sheet_has_a_sample_of_every_kind_of_question(
    folder: Path, drawn: list[tuple[Path | None, str, str]]
) -> None:
    rare = ["deep/1.png,is it round?,yes", "deep/2.png,which? A. red B. blue,B", "deep/3.png,how many?,3"]
    lines = [f"deep/{n % 5}.png,which number is {n}?,number {n}" for n in range(60)]
    made = make(folder, [TABLE[0], *lines[:5], *rare, *lines[5:]])
    assert len(drawn) == 10 and {kind_of(question, answer) for _, question, answer in drawn} == set(KINDS)
    assert made["questions"] == "open answer 60, letter of a choice 1, yes or no 1, number 1"
    assert made["train"] + made["test"] == 63, "the sheet only shows what the table has"


def test_every_line_that_cannot_be_used_is_named_and_nothing_is_written(folder: Path) -> None:
    (folder / "photos" / "broken.png").write_bytes(b"no image")
    (folder / "secret.png").write_bytes(picture(1))
    bad = ["missing.png,what?,x", "broken.png,what?,x", "../secret.png,what?,x", "deep/1.png,,x", "deep/1.png,what?,"]
    with pytest.raises(UserError) as error:
        make(folder, [*TABLE, *bad])
    for sentence in (
        "line 12: the image 'missing.png' does not exist",
        "line 13: the image 'broken.png' cannot be decoded",
        "line 14: the image '../secret.png' is outside",
        "line 15 has no question",
        "line 16 has no answer",
    ):
        assert sentence in str(error.value)
    assert not (folder / "own").exists()


@pytest.mark.parametrize(
    ("lines", "name", "options", "sentence"),
    [
        (["picture,query,reply", "a,b,c"], "t.csv", {}, "expected a first line that names image, question and answer"),
        (TABLE[:3], "t.csv", {}, "has 2 samples; expected at least 4"),
        (["{"], "t.jsonl", {}, "line 1 is not JSON"),
        (["[]"], "t.jsonl", {}, "line 1 holds no object"),
        (TABLE, "t.csv", {"metric": "exat"}, "Did you mean 'exact'"),
        ([TABLE[0], *(f"deep/1.png,q{n},a" for n in range(5))], "t.csv", {}, "the same image"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(
    folder: Path, lines: list[str], name: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        make(folder, lines, name, **options)


def test_a_task_that_is_there_is_not_overwritten(folder: Path) -> None:
    make(folder, TABLE)
    with pytest.raises(UserError, match="is there already"):
        make(folder, TABLE)


@pytest.mark.parametrize("column", ["img", "image_path", "Photo", "filename"])
def test_a_column_that_is_likely_to_hold_the_pictures_must_be_called_image(folder: Path, column: str) -> None:
    with pytest.raises(UserError, match=f"has '{column}' and no image; did you mean image"):
        make(folder, [f"{column},question,answer", *TABLE[1:]])


def test_a_field_of_a_record_that_is_likely_to_hold_the_picture_must_be_called_image(folder: Path) -> None:
    lines = [json.dumps({"Img": f"deep/{n % 5}.png", "question": f"{n}?", "answer": "x"}) for n in range(6)]
    with pytest.raises(UserError, match="line 1 has 'Img' and no image; did you mean image"):
        make(folder, lines, "samples.jsonl")


def test_other_columns_are_no_hindrance(folder: Path) -> None:
    made = make(folder, ["question,answer,source", *(f"what is {n}?,{n},a book" for n in range(6))])
    assert made["pictures"] == 0


def test_a_task_without_pictures_is_said_to_have_none(folder: Path) -> None:
    table, root = folder / "samples.csv", str(folder / "own")
    table.write_text("question,answer\n" + "".join(f"what is {n}?,{n}\n" for n in range(6)))
    arguments = ["--images", str(folder / "photos"), "--samples", str(table), "--root", root]
    done = CliRunner().invoke(app, ["new-task", "Sums", *arguments])
    assert done.exit_code == EXIT_OK, done.stderr
    assert "Sums has no pictures" in done.stdout


@pytest.mark.parametrize("name", ["Größe", "a b", "-x", "n" * 300, ""])
def test_a_name_that_a_run_would_refuse_is_refused_at_once(folder: Path, name: str) -> None:
    (folder / "samples.csv").write_text("\n".join(TABLE))
    with pytest.raises(UserError, match="cannot name a task; expected letters, digits"):
        make_task(NewTask(name, folder / "own"), folder / "photos", folder / "samples.csv")


def test_copies_of_the_images_stay_in_the_tasks_folder(folder: Path) -> None:
    lines = [
        TABLE[0],
        "deep/../deep/1.png,a?,x",
        "../photos/deep/2.png,b?,x",
        f"{folder}/photos/deep/3.png,c?,x",
        f"../../{folder.name}/photos/deep/0.png,d?,x",
    ]
    make(folder, lines)
    copies = {str(path.relative_to(folder / "own")) for path in (folder / "own").rglob("*.png")}
    assert copies == {f"images/Mine/deep/{n}.png" for n in range(4)} | {"sheets/Mine.png"}
    shown = [s.image for split in ("train", "test") for s in read_task(folder / "own", "Mine", split)]
    assert len(shown) == 4


@pytest.mark.parametrize("path", ["n" * 300 + ".png", "a\0b.png"])
def test_a_path_that_no_file_can_have_is_a_line_that_cannot_be_used(folder: Path, path: str) -> None:
    with pytest.raises(UserError, match=r"line 1: the image .* cannot be read"):
        make(folder, [json.dumps({"image": path, "question": "?", "answer": "x"})] * 2, "samples.jsonl")


def test_a_field_that_is_too_long_for_a_table_is_a_sentence(folder: Path) -> None:
    with pytest.raises(UserError, match=r"line 12 cannot be read .*field larger"):
        make(folder, [*TABLE, f"deep/1.png,{'long ' * 40_000},x"])


def test_test_answers_that_cannot_be_generated_whole_are_told(folder: Path) -> None:
    lines = [json.dumps({"question": f"what is {n}?", "answer": "a word " * 10}) for n in range(6)]
    made = make(folder, lines, "samples.jsonl", max_new_tokens=16)
    count = made["test"]
    assert f"{count} of {count} test answers have more words than the 16 tokens" in made["long_answers"]
    assert "long_answers" not in make_task(
        NewTask("Other", folder / "own", max_new_tokens=20), folder / "photos", folder / "samples.jsonl"
    )
