"""Tables of every kind become the same task; what is wrong with one is a sentence, and no file is left half-written."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openpyxl import Workbook
from typer.testing import CliRunner

from data_prep.own_rows import reading_of
from data_prep.own_task import NewTask, make_task
from data_prep.sources.coin import read_task
from data_prep.tables.open import open_table
from data_prep.tables.text import CHUNK
from pipeline.cli.commands import app
from pipeline.errors import EXIT_OK, EXIT_USER, UserError
from tests.tiny_clip import picture

RECORDS = [{"image": f"{n % 5}.png", "question": f"which, {n}?", "answer": f"n {n}"} for n in range(10)]
READ = sorted((r["question"], r["answer"], picture(n % 5)) for n, r in enumerate(RECORDS))
CLASSES = ["ant", "bee"]


def workbook(path: Path, rows: list[list[Any]], *, sheets: tuple[str, ...] = ("Samples",)) -> Path:
    book = Workbook()
    book.remove(book.worksheets[0])
    for name in sheets:
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def as_rows(records: list[dict[str, Any]]) -> list[list[Any]]:
    return [list(records[0]), *(list(record.values()) for record in records)]


def embedded(records: list[dict[str, Any]]) -> pa.Table:
    """Records with the images' bytes as `datasets` stores them."""
    rows = [{**r, "image": {"bytes": picture(int(r["image"][0])), "path": r["image"]}} for r in records]
    return pa.Table.from_pylist(rows)


def save_stream(folder: Path, table: pa.Table, files: int = 1) -> Path:
    """Saves a table as `datasets` does: Arrow streams, state.json, dataset_info.json."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{files:05d}.arrow" for n in range(files)]
    step = -(-len(table) // files)
    for number, name in enumerate(names):
        part = table.slice(number * step, step)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as writer:
            writer.write_table(part, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def save_shards(folder: Path, table: pa.Table, split: str = "train", files: int = 2) -> Path:
    """Saves a table as the Hub has it."""
    folder.mkdir(parents=True, exist_ok=True)
    step = -(-len(table) // files)
    for number in range(files):
        pq.write_table(table.slice(number * step, step), folder / f"{split}-{number:05d}-of-{files:05d}.parquet")
    return folder


def new_task(table: Path, images: Path | None = None, **options: Any) -> list[tuple[str, str, bytes | None]]:
    """Question, answer and image of every sample of the task that a table becomes."""
    root = table.parent / "own"
    make_task(NewTask("Mine", root), images, table, reading_of(**options))
    found = [sample for split in ("train", "test") for sample in read_task(root, "Mine", split)]
    return sorted((sample.question, sample.answer, sample.image) for sample in found)


def refused(table: Path, images: Path | None = None, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        new_task(table, images, **options)
    assert not (table.parent / "own").exists()
    return str(raised.value)


def text(path: Path, content: str) -> Path:
    path.write_text(content, "utf-8")
    return path


# ---------------------------------------------------------------------------------------------- kinds

WITH_PATHS: dict[str, Callable[[Path], Path]] = {
    "JSON lines": lambda path: text(path / "t.jsonl", "\n".join(map(json.dumps, RECORDS))),
    "JSON array": lambda path: text(path / "t.json", json.dumps(RECORDS, indent=1)),
    "semicolons": lambda path: text(
        path / "t.csv", "\n".join(";".join(map(str, row)) for row in as_rows(RECORDS)) + "\n"
    ),
    "workbook": lambda path: workbook(path / "t.xlsx", as_rows(RECORDS)),
    "Parquet": lambda path: pq.write_table(pa.Table.from_pylist(RECORDS), path / "t.parquet") or path / "t.parquet",
    "saved dataset": lambda path: save_stream(path / "saved", pa.Table.from_pylist(RECORDS), 2),
}
WITH_BYTES: dict[str, Callable[[Path], Path]] = {
    "Parquet": lambda path: pq.write_table(embedded(RECORDS), path / "t.parquet") or path / "t.parquet",
    "saved dataset": lambda path: save_stream(path / "saved", embedded(RECORDS), 3),
    "the Hub's files": lambda path: save_shards(path / "hub" / "data", embedded(RECORDS)).parent,
    "a configuration's folder": lambda path: save_shards(path / "hub" / "default", embedded(RECORDS)).parent,
}


@pytest.mark.parametrize("kind", WITH_PATHS)
def test_a_table_with_paths_becomes_the_same_task_whatever_its_kind(photos: Path, kind: str) -> None:
    assert new_task(WITH_PATHS[kind](photos.parent), photos) == READ


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_images_in_the_table_need_no_folder(tmp_path: Path, kind: str) -> None:
    table = WITH_BYTES[kind](tmp_path)
    assert new_task(table) == READ
    names = {path.name for path in (tmp_path / "own" / "images" / "Mine").iterdir()}
    assert names == {f"{hashlib.sha256(picture(n)).hexdigest()[:32]}.png" for n in range(5)}


def test_a_column_of_bytes_and_a_list_with_one_image_are_images(tmp_path: Path) -> None:
    for name, wrap in (("bytes", lambda b: b), ("list", lambda b: [{"bytes": b, "path": None}])):
        (folder := tmp_path / name).mkdir()
        rows = [{**r, "image": wrap(picture(n % 5))} for n, r in enumerate(RECORDS)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
        assert new_task(folder / "t.parquet") == READ


def test_images_of_a_dataset_may_lie_in_its_folder(tmp_path: Path) -> None:
    rows = [{**r, "image": {"bytes": None, "path": r["image"]}} for r in RECORDS]
    folder = save_shards(tmp_path / "hub", pa.Table.from_pylist(rows))
    for number in range(5):
        (folder / f"{number}.png").write_bytes(picture(number))
    assert new_task(folder) == READ


def test_splits_of_a_dataset_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "data"
    save_shards(folder, embedded(RECORDS[:7]))
    save_shards(folder, embedded(RECORDS[7:]), "validation", 1)
    save_shards(folder, embedded(RECORDS[:1]), "other", 1)
    made = make_task(NewTask("Mine", tmp_path / "own"), None, folder.parent)
    asked = {s.question for s in read_task(tmp_path / "own", "Mine", "test")}
    assert (made["train"], made["test"]) == (7, 3) and asked == {r["question"] for r in RECORDS[7:]}
    assert "3 of the images or questions for testing are in training too" in made["shared_images"]


def test_splits_that_were_saved_to_disk_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_stream(folder / "train", embedded(RECORDS[:6]))
    save_stream(folder / "test", embedded(RECORDS[6:]))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    made = make_task(NewTask("Mine", tmp_path / "own"), None, folder)
    assert (made["train"], made["test"]) == (6, 4)


@pytest.mark.parametrize("place", ["schema", "description"])
def test_classes_get_their_names(tmp_path: Path, place: str) -> None:
    features = {"answer": {"_type": "ClassLabel", "names": CLASSES}, "question": {"_type": "Value"}}
    table = pa.Table.from_pylist([{"question": f"q{n}", "answer": n % 2} for n in range(6)])
    if place == "schema":
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, tmp_path / "t.parquet")
        found = new_task(tmp_path / "t.parquet")
    else:
        folder = save_stream(tmp_path / "saved", table)
        (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
        found = new_task(folder)
    assert found == [(f"q{n}", CLASSES[n % 2], None) for n in range(6)]


def test_whole_numbers_of_a_column_with_gaps_are_written_whole(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": float(n), "other": None} for n in range(4)]
    pq.write_table(pa.Table.from_pylist([*rows, {"question": "half", "answer": 0.5}]), tmp_path / "t.parquet")
    assert [answer for _, answer, _ in new_task(tmp_path / "t.parquet")] == ["0.5", "0", "1", "2", "3"]


def test_numbers_of_a_workbook_are_text(tmp_path: Path) -> None:
    rows: list[list[Any]] = [["question", "answer"], ["a", 3], ["b", 2.5], [], ["c", "x"], ["d", 1.0]]
    assert [answer for _, answer, _ in new_task(workbook(tmp_path / "t.xlsx", rows))] == ["3", "2.5", "x", "1"]


def test_an_exact_number_is_text(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": Decimal("1.50")} for n in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert {answer for _, answer, _ in new_task(tmp_path / "t.parquet")} == {"1.50"}


def test_an_array_is_read_across_the_ends_of_chunks(tmp_path: Path) -> None:
    records = [{"question": f"q{n:03d}", "answer": "é" * 3000} for n in range(CHUNK // 1000)]
    found = new_task(text(tmp_path / "t.json", json.dumps(records, ensure_ascii=False)))
    assert [question for question, _, _ in found] == [record["question"] for record in records]


# ---------------------------------------------------------------------------------------------- options


def test_columns_are_mapped(photos: Path) -> None:
    records = [{"photo": r["image"], "Prompt": r["question"], "label": r["answer"], "answer": "no"} for r in RECORDS]
    for table in (
        text(photos.parent / "t.jsonl", "\n".join(map(json.dumps, records))),
        workbook(photos.parent / "t.xlsx", as_rows(records)),
    ):
        root = photos.parent / table.suffix
        reading = reading_of(["image=photo,question=Prompt", "answer=label"])
        make_task(NewTask("Mine", root), photos, table, reading)
        found = [s for split in ("train", "test") for s in read_task(root, "Mine", split)]
        assert sorted((s.question, s.answer, s.image) for s in found) == READ


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ("image", "--columns has 'image'; expected NAME=COLUMN"),
        ("imag=photo", "--columns names 'imag'; expected image, question, answer. Did you mean 'image'?"),
        ("image=a,image=b", "--columns has image more than once"),
        ("question=a,answer=a", "--columns has a more than once"),
        ("answer=Answers", "has the columns prompt, answer; expected 'Answers', which --columns names."),
        ("question=promt", "expected 'promt', which --columns names. Did you mean 'prompt'?"),
    ],
)
def test_a_mapping_that_cannot_be_meant_is_refused(tmp_path: Path, named: str, sentence: str) -> None:
    table = text(tmp_path / "t.csv", "prompt,answer\n" + "a,b\n" * 5)
    with pytest.raises(UserError) as raised:
        new_task(table, named=[named])
    assert sentence in str(raised.value)


def test_a_separator_may_be_said(tmp_path: Path) -> None:
    content = "question\tanswer\n" + "".join(f"q;{n},x\ta\n" for n in range(5))
    table = text(tmp_path / "t.csv", content)
    assert "--separator is 'pipe'; expected comma, semicolon, tab" in refused(table, separator="pipe")
    assert len(new_task(table, separator="tab")) == 5


def test_a_sheet_is_named_where_there_are_several(tmp_path: Path) -> None:
    rows = as_rows([{"question": f"q{n}", "answer": "a"} for n in range(5)])
    table = workbook(tmp_path / "t.xlsx", rows, sheets=("Notes", "Samples"))
    assert "has the sheets Notes, Samples; name the one with the samples by --sheet" in refused(table)
    assert "has no sheet 'Sample'; it has Notes, Samples. Did you mean 'Samples'?" in refused(table, sheet="Sample")
    assert len(new_task(table, sheet="Samples")) == 5


def test_an_option_of_another_kind_is_refused(tmp_path: Path) -> None:
    table = text(tmp_path / "t.csv", "question,answer\n" + "a,b\n" * 5)
    assert "--sheet is for a workbook, and" in refused(table, sheet="One")
    (tmp_path / "t.csv").unlink()
    assert "--separator is for CSV, and" in refused(workbook(tmp_path / "t.xlsx", [["question"]]), separator=",")


def test_the_verb_takes_a_table_with_images_and_other_names(tmp_path: Path) -> None:
    table = embedded(RECORDS).rename_columns(["picture", "prompt", "label"])
    pq.write_table(table, tmp_path / "t.parquet")
    arguments = [
        "new-task",
        "Mine",
        "--samples",
        str(tmp_path / "t.parquet"),
        "--root",
        str(tmp_path / "own"),
        "--json",
    ]
    done = CliRunner().invoke(app, [*arguments, "--columns", "image=picture,question=prompt,answer=label"])
    assert done.exit_code == EXIT_OK, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["pictures"] == 5 and made["train"] + made["test"] == 10
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == EXIT_USER and "is there already" in done.stdout


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.xlsx", b"image,question,answer\n", "is CSV by its content, and not what its name says"),
        ("t.csv", b"PAR1", "is Parquet by its content, and not what its name says"),
        ("t.csv", b'{"question": "a"}', "is JSON lines by its content"),
        ("t.parquet", b"question,answer", "is CSV by its content"),
        ("t.xls", b"\xd0\xcf\x11\xe0\xa1\xb1", "is a workbook of an older Excel; save it as .xlsx"),
        ("t.csv.gz", b"\x1f\x8b\x08", "is compressed; unpack it"),
        ("t.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        ("t.csv", b"<!DOCTYPE html>", "is a web page"),
        ("t.xlsx", b"PK\x03\x04rest", "is a damaged archive"),
        ("t.csv", b" \n ", "is empty; expected a table"),
        ("t.parquet", b"PAR1" + b"0" * 60, "cannot be read (ArrowInvalid"),
        ("t.arrow", b"\xff\xff\xff\xff\x10", "cannot be read ("),
        ("t.json", b"[1, 2]", "entry 1 holds no object"),
        ("t.json", b'[{"question": "a", "answer": "b"}, {"question": ', "entry 2 is not JSON"),
        ("t.json", b'[{"question": "a", "answer": "b"}', "the file ends inside the array"),
        ("t.json", b'[{"question": "a", "answer": "b"}] x', "has text behind its array"),
        ("t.json", b'[{"query": "a", "answer": "b"}]', "expected fields that are called image, question and answer"),
        ("t.json", b'[{"question": "\xe4"}]', "line 1 holds the byte 0xe4"),
        ("t.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("t.csv", b"question,answers\na,b\n", "Write answer in place of answers, or --columns answer=answers."),
    ],
)
def test_a_file_that_is_no_table_is_a_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name)
    assert sentence in message and len(message) < 500


def test_an_archive_that_is_no_workbook_is_refused(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("content.xml", "<office/>")
    assert "is an archive and no .xlsx workbook" in refused(tmp_path / "t.zip")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([["question", "answer"], ["a", True]], "row 2: answer is bool, expected text or a number"),
        ([["question", "answer"], ["a", None]], "row 2 has no answer"),
        ([["question", "answer"], ["a", "b", "c"]], "row 2 has values right of the 2 columns"),
        ([["question", "answer"], ["a", "#N/A"]], "row 2: answer is the error #N/A; correct the formula"),
        ([["question", "question"]], "row 1 has the column question more than once"),
        ([[], ["Title"]], "row 2 has the columns Title; expected a first row that names"),
        ([["Photo", "question", "answer"], ["1.png", "a", "b"]], "row 1 has 'Photo' and no image"),
        ([["question", "answer"], ["a", "=1/0"], ["b", "x"]], "row 2 has no answer"),  # a formula without a value
    ],
)
def test_a_sheet_that_cannot_be_used_is_a_sentence(tmp_path: Path, rows: list[list[Any]], sentence: str) -> None:
    assert sentence in refused(workbook(tmp_path / "t.xlsx", rows))


def test_every_row_of_an_embedded_table_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    images = [picture(0), b"no image", None, picture(1), picture(2)]
    rows = [{"image": {"bytes": i, "path": "https://a.org/1.png"}, "question": "q", "answer": "a"} for i in images]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    message = refused(tmp_path / "t.parquet")
    assert "row 2: the image in the table cannot be decoded" in message
    assert "row 3: the image 'https://a.org/1.png' is an address; images are not fetched" in message


def test_several_images_of_one_question_and_lists_of_answers_are_refused(tmp_path: Path) -> None:
    rows = [{"image": [picture(0), picture(1)], "question": "q", "answer": ["a", "b"]} for _ in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert "row 1: answer is list, expected text or a number" in refused(tmp_path / "t.parquet")
    pq.write_table(pa.Table.from_pylist([{**row, "answer": "a"} for row in rows]), tmp_path / "t.parquet")
    assert "row 1: the image is a list of 2 images; expected one" in refused(tmp_path / "t.parquet")


def test_a_path_without_a_folder_asks_for_one(tmp_path: Path) -> None:
    table = WITH_PATHS["JSON lines"](tmp_path)
    assert "line 1: the image '0.png' is a path; expected --images" in refused(table)


def test_a_folder_that_lacks_files_is_refused(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "hub", embedded(RECORDS))
    (folder / "train-00001-of-00002.parquet").unlink()
    assert "lacks 1 of the 2 files of train (the first: number 00001)" in refused(folder)
    (folder / "train-00001-of-00002.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "train-00001-of-00002.parquet is a pointer of Git LFS" in refused(folder)
    (tmp_path / "empty").mkdir()
    assert "is a folder without a dataset" in refused(tmp_path / "empty")
    saved = save_stream(tmp_path / "saved", embedded(RECORDS), 2)
    (saved / "data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow does not exist (1 of 2 files)" in refused(saved)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../own.arrow"}]}))
    assert "names '../own.arrow', which is not in its folder" in refused(saved)
    (saved / "state.json").unlink()
    assert "has dataset_info.json and no state.json" in refused(saved)


def test_splits_without_training_and_several_configurations_are_refused(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "hub" / "one", embedded(RECORDS), "test", 1).parent
    save_shards(tmp_path / "hub" / "one", embedded(RECORDS), "validation", 1)
    assert "has the splits test, validation; expected train" in refused(folder)
    save_shards(tmp_path / "hub" / "two", embedded(RECORDS))
    assert "has several configurations" in refused(folder)


def test_a_table_that_changes_while_it_is_read_leaves_no_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = text(tmp_path / "t.jsonl", "\n".join(json.dumps({"question": f"{n}", "answer": "a"}) for n in range(6)))
    from data_prep import own_task

    def longer(*arguments: Any) -> Any:
        plan = own_split_plan(*arguments)
        table.write_text(table.read_text() + '\n{"question": "late", "answer": "a"}')
        return plan

    own_split_plan = own_task.draw
    monkeypatch.setattr(own_task, "draw", longer)
    with pytest.raises(UserError, match="has changed while it was read"):
        new_task(table)
    assert list((tmp_path / "own" / "instructions").iterdir()) == []


# ---------------------------------------------------------------------------------------------- memory


def lines_of_size(path: Path, rows: int) -> Path:
    with path.open("w") as file:
        for number in range(rows):
            file.write(json.dumps({"question": f"question {number}", "answer": "long " * 200}) + "\n")
    return path


def array_of_size(path: Path, rows: int) -> Path:
    with path.open("w") as file:
        for number in range(rows):
            entry = json.dumps({"question": f"question {number}", "answer": "long " * 200})
            file.write(("[" if number == 0 else ",") + entry)
        file.write("]")
    return path


@pytest.mark.parametrize("kind", ["t.jsonl", "t.json"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, kind: str) -> None:
    write = lines_of_size if kind == "t.jsonl" else array_of_size

    def peak(rows: int) -> int:
        table = open_table(write(tmp_path / kind, rows), reading_of())
        tracemalloc.start()
        count = sum(1 for _ in table.rows())
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == rows
        return most

    assert peak(20_000) < 2 * peak(2_000) + (1 << 16)  # the larger file has 21 MB
