"""Reads text files from other programs: UTF-8 with or without a byte order mark, as JSON, lines or CSV tables.

All sources use these functions, which handle what is common in such files: Windows editors write a byte order mark,
Excel saves CSV in cp1252, and scraped text holds U+2028, which `str.splitlines` treats as the end of a line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, nearest

SHOWN = 120  # characters of a file's content that a message quotes
_SPREADSHEET = b"PK\x03\x04"  # an .xlsx or .ods file is a zip archive


def read_text(path: Path) -> str:
    """Return a file's text without byte order mark; UserError that names the line for a file that is not UTF-8."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    if content.startswith(_SPREADSHEET):
        raise UserError(f"{path} is a spreadsheet or an archive, expected text. Save the table as CSV in UTF-8.")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16, expected UTF-8. Save it as UTF-8 (in Excel: 'CSV UTF-8').")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line} holds the byte 0x{content[error.start]:02x}, which is not UTF-8 (an older encoding "
            "such as cp1252?). Save the file as UTF-8 (in Excel: 'CSV UTF-8')."
        ) from None


def read_json(path: Path, expected: str, advice: str = "Restore the file.") -> Any:
    """Return the content of a JSON file; UserError that names the file and what was expected when it is not JSON."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); expected {expected}. {advice}") from None


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and content of the lines that are not blank; only a line feed ends a line."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


@dataclass(frozen=True)
class Fault:
    """The error message about a line of a table that cannot be read; it names file and line."""

    sentence: str


def csv_rows(
    path: Path, needed: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str] | Fault]]:
    """Yield line number and fields of each row of a CSV table, by the names in its header as `column` spells them.

    A row with more or fewer fields than the header, as an unquoted comma causes, is a `Fault`. Raises UserError for a
    header that lacks a `needed` column or has one twice, and for a quote that is not closed.
    """
    text, names = read_text(path), (*optional, *needed)
    columns = f"{', '.join(names[:-1])} and {names[-1]}"
    if text.lstrip().startswith("["):
        raise UserError(f"{path} holds a JSON array; expected CSV with the columns {columns}, or one object a line.")
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [column(name, names) for name in next(reader, [])]
        _check_header(path, header, needed, columns)
        for row in reader:
            if not any(field.strip() for field in row):
                continue
            if len(row) == len(header):
                yield reader.line_num, dict(zip(header, row, strict=True))
                continue
            found = f"{path}, line {reader.line_num} has {len(row)} fields, the header has {len(header)}"
            yield reader.line_num, Fault(f"{found}; put text that holds a comma in double quotes.")
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num} cannot be read ({error}); expected {columns} in CSV. Look for a "
            "quote that is not closed."
        ) from None


def column(name: str, known: Sequence[str]) -> str:
    """The name of a column: a known one without regard to case and outer blanks, else as it is written."""
    name = name.strip()
    return name.lower() if name.lower() in known else name


def _check_header(path: Path, header: list[str], needed: Sequence[str], columns: str) -> None:
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise UserError(f"{path} has the column {twice[0]} more than once. Keep one of them.")
    lacking = [name for name in needed if name not in header]
    if not lacking:
        return
    separator = next((mark for mark in (";", "\t") if len(header) == 1 and mark in header[0]), None)
    if separator is not None:
        name = {";": "semicolons", "\t": "tabs"}[separator]
        raise UserError(f"{path} is separated by {name}; expected commas between {columns}. Save it so.")
    close = next((other for other in header if other not in needed and nearest(lacking[0], [other])), None)
    advice = f"Write {lacking[0]} in place of {close}." if close else f"Add '{lacking[0]}'."
    raise UserError(
        f"{path} has the columns {shown(', '.join(header)) or '(none)'}; expected a first line that names {columns}. "
        f"{advice}"
    )


def shown(text: str) -> str:
    """A text cut to SHOWN characters, for messages."""
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
