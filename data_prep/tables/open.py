"""Opens a table of samples: recognises its kind by its content, and reads its rows one after the other."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.sources.text_files import Columns, refuse_start
from data_prep.tables.rows import Rows
from data_prep.tables.text import csv_table, json_array, json_lines
from pipeline.cli.lazy import lazy
from pipeline.errors import UserError

if TYPE_CHECKING:
    from data_prep.tables import arrow_files, dataset_folder, spreadsheet
else:  # openpyxl and pyarrow are needed, and imported, for their own kinds of tables only
    arrow_files = lazy("data_prep.tables.arrow_files")
    dataset_folder = lazy("data_prep.tables.dataset_folder")
    spreadsheet = lazy("data_prep.tables.spreadsheet")

CSV, LINES, ARRAY, XLSX, PARQUET, ARROW = "CSV", "JSON lines", "a JSON array", "a workbook", "Parquet", "Arrow"
# What a file of this name has to be.
BY_NAME = {
    ".csv": {CSV},
    ".tsv": {CSV},
    ".txt": {CSV},
    ".jsonl": {LINES},
    ".ndjson": {LINES},
    ".json": {LINES, ARRAY},
    ".xlsx": {XLSX},
    ".xlsm": {XLSX},
    ".parquet": {PARQUET},
    ".pq": {PARQUET},
    ".arrow": {ARROW},
    ".feather": {ARROW},
}
OTHERS = {
    b"\xd0\xcf\x11\xe0": "a workbook of an older Excel; save it as .xlsx",
    b"\x1f\x8b": "compressed; unpack it",
    b"version https://git-lfs": "a pointer of Git LFS in place of the file; fetch it with `git lfs pull`",
    b"%PDF": "a PDF; save the table as CSV",
    b"<!do": "a web page; download the file itself",
    b"<htm": "a web page; download the file itself",
}
KINDS = "expected CSV, JSON, .xlsx or Parquet"


@dataclass(frozen=True)
class Reading:
    """How a table is read: which columns, and what its kind leaves open."""

    columns: Columns
    separator: str | None = None  # of CSV, by default found by the header
    sheet: str | None = None  # of a workbook with several


@dataclass(frozen=True)
class Table:
    """A table of samples, which may come in splits."""

    path: Path
    kind: str
    parts: Mapping[str, Callable[[], Rows]] = field(default_factory=dict)  # by split; "" for a table without

    def rows(self, part: str = "") -> Rows:
        """The rows of one part, read anew at each call; raises UserError for a table that cannot be read."""
        return self.parts[part]()


def open_table(path: Path, reading: Reading) -> Table:
    """Recognise a table by its content; UserError for anything else, and for a name that says another kind."""
    if path.is_dir():
        found = dataset_folder.dataset_files(path)
        _refuse_options(path, "a dataset", reading, set())

        def part(files: list[Path]) -> Callable[[], Rows]:
            return lambda: arrow_files.arrow_rows(files, reading.columns, found.classes)

        return Table(path, "dataset", {split: part(files) for split, files in found.splits.items()})
    kind = _kind(path)
    readers: dict[str, Callable[[], Rows]] = {
        CSV: lambda: csv_table(path, reading.columns, reading.separator),
        LINES: lambda: json_lines(path, reading.columns),
        ARRAY: lambda: json_array(path, reading.columns),
        XLSX: lambda: spreadsheet.workbook_rows(path, reading.columns, reading.sheet),
        PARQUET: lambda: arrow_files.arrow_rows([path], reading.columns, {}),
        ARROW: lambda: arrow_files.arrow_rows([path], reading.columns, {}),
    }
    _refuse_options(path, kind, reading, {"separator"} if kind == CSV else {"sheet"} if kind == XLSX else set())
    return Table(path, kind, {"": readers[kind]})


def _kind(path: Path) -> str:
    """The kind of a file; the name decides only between kinds of text."""
    try:
        with path.open("rb") as file:
            start = file.read(1 << 12)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    if not start.strip():
        raise UserError(f"{path} is empty; expected a table of samples.")
    expected = BY_NAME.get(path.suffix.lower())
    kind = _binary(path, start) or _text(start, expected)
    if expected is not None and kind not in expected:
        raise UserError(
            f"{path} is {kind} by its content, and not what its name says. Give it the name of its kind, or save it "
            f"as {' or '.join(sorted(expected))}."
        )
    return kind


def _binary(path: Path, start: bytes) -> str | None:
    if start.startswith(b"PAR1"):
        return PARQUET
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return ARROW
    for begin, what in OTHERS.items():
        if start[: len(begin)].lower() == begin.lower():
            raise UserError(f"{path} is {what}; {KINDS}.")
    if start.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile as error:
            raise UserError(f"{path} is a damaged archive ({error}); {KINDS}. Save or download it again.") from None
        if "xl/workbook.xml" not in names:
            raise UserError(
                f"{path} is an archive and no .xlsx workbook; {KINDS}. Unpack it, or save the table as CSV."
            )
        return XLSX
    refuse_start(path)
    return None


def _text(start: bytes, expected: set[str] | None) -> str:
    text = start.decode("utf-8-sig", "replace").lstrip()
    if expected == {LINES} or text.startswith("{"):
        return LINES
    return ARRAY if text.startswith("[") else CSV


def _refuse_options(path: Path, kind: str, reading: Reading, known: set[str]) -> None:
    for name, needs in (("separator", CSV), ("sheet", XLSX)):
        if getattr(reading, name) is not None and name not in known:
            raise UserError(f"--{name} is for {needs}, and {path} is {kind}. Leave it out.")
