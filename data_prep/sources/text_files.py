"""Reads text files from other programs: UTF-8 with or without a byte order mark, as JSON, lines or CSV tables.

All sources use these functions, which handle what is common in such files: Windows editors write a byte order mark,
Excel saves CSV in cp1252, and scraped text holds U+2028, which `str.splitlines` treats as the end of a line.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    _refuse_start(path, content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(_not_utf_8(path, line, content[error.start])) from None


def read_json(path: Path, expected: str, advice: str = "Restore the file.") -> Any:
    """Return the content of a JSON file; UserError that names the file and what was expected when it is not JSON."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); expected {expected}. {advice}") from None


def text_lines(path: Path, end: str = "") -> Iterator[str]:
    """Yield a file's lines with their ends, without a byte order mark and without reading it whole.

    `end` is as in `open`: "" for all three kinds of line ends, "\\n" for line feeds alone. Raises UserError as
    `read_text` does.
    """
    try:
        with path.open(encoding="utf-8-sig", newline=end) as file:
            yield from file
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    except UnicodeDecodeError:
        refuse_encoding(path)
        raise


def refuse_encoding(path: Path) -> None:
    """Raise UserError for a file that is not UTF-8 text, with the first line that is not."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                _refuse_start(path, line)
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(_not_utf_8(path, number, line[error.start])) from None


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and content of the lines that are not blank; only a line feed ends a line."""
    refuse_start(path)
    for number, line in enumerate(text_lines(path, "\n"), start=1):
        if line.strip():
            yield number, line.strip()


@dataclass(frozen=True)
class Fault:
    """The error message about a line of a table that cannot be read; it names file and line."""

    sentence: str


@dataclass(frozen=True)
class Columns:
    """The columns that are read of a table.

    Args:
        needed: names without which a table is refused.
        optional: further names.
        called: the table's own names, by those of `needed` and `optional`, where they are others.
        option: how a user says them; "" where that is not possible.
    """

    needed: Sequence[str]
    optional: Sequence[str] = ()
    called: Mapping[str, str] = field(default_factory=dict)
    option: str = ""

    @property
    def known(self) -> tuple[str, ...]:
        """All names, the optional ones first."""
        return (*self.optional, *self.needed)

    @property
    def listed(self) -> str:
        """All names as a message lists them."""
        return f"{', '.join(self.known[:-1])} and {self.known[-1]}"

    def spelled(self, header: Iterable[str]) -> list[str]:
        """The names of a header: known ones whatever their case and outer blanks, else as they are written.

        A column that `called` names gets the name it stands for, and another column of that name a blank before it.
        """
        ours = {theirs: name for name, theirs in self.called.items()}
        found = []
        for written in header:
            name = written.strip()
            plain = name.lower()
            if name in ours:
                found.append(ours[name])
            elif plain in self.known:
                found.append(f" {plain}" if plain in self.called else plain)
            else:
                found.append(name)
        return found

    def require(self, where: str, header: Sequence[str], place: str = "a first line that names") -> None:
        """Raise UserError for a header as `spelled` returns it that lacks a needed column or has one twice.

        `where` names the table, `place` says what names its columns.
        """
        twice = sorted({name for name in header if name and header.count(name) > 1})
        if twice:
            raise UserError(f"{where} has the column {twice[0]} more than once. Keep one of them.")
        written = f"{where} has the columns {shown(', '.join(name.strip() for name in header if name)) or '(none)'}"
        for name, theirs in self.called.items():
            if name not in header:
                raise UserError(f"{written}; expected '{theirs}', which {self.option} names.{nearest(theirs, header)}")
        lacking = [name for name in self.needed if name not in header]
        if not lacking:
            return
        others = [name for name in header if name.strip() and name not in self.needed]
        near = {name: next((other for other in others if nearest(name, [other])), None) for name in lacking}
        close, absent = near[lacking[0]], ", ".join(f"'{name}'" for name in lacking)
        # All of them at once, with those that the option names already: it is given once.
        pairs = ",".join(f"{name}={theirs or 'NAME'}" for name, theirs in {**self.called, **near}.items())
        option = f", or {self.option} {shlex.quote(pairs) if ' ' in pairs else pairs}" if self.option else ""
        advice = f"Write {lacking[0]} in place of {close}{option}." if close else f"Add {absent}{option}."
        raise UserError(f"{written}; expected {place} {self.listed}. {advice}")


SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
_TOLD = re.compile(r"sep=([,;]|\t)")


def csv_rows(
    path: Path, columns: Columns, separator: str | None = None
) -> Iterator[tuple[int, dict[str, str] | Fault]]:
    """Yield line number and fields of each row of a CSV table, by the names in its header as `columns` spells them.

    `separator` is one of SEPARATORS; None: the one by which the header has most of the columns. A row with more or
    fewer fields than the header, as an unquoted comma causes, is a `Fault`. Raises UserError as `Columns.require`
    does, and for a quote that is not closed.
    """
    refuse_start(path)
    lines = text_lines(path)
    first = next(lines, "")
    told = _TOLD.fullmatch(first.strip())  # a line that Excel reads, and some programs write, above the header
    if told is None:
        lines = itertools.chain([first], lines)
    if separator is None:
        separator = told[1] if told else separator_of(first, columns)
    reader, before = csv.reader(lines, delimiter=separator), int(told is not None)
    try:
        header = columns.spelled(next(reader, []))
        columns.require(str(path), header)
        for row in reader:
            if not any(field.strip() for field in row):
                continue
            line = before + reader.line_num
            if len(row) == len(header):
                yield line, dict(zip(header, row, strict=True))
                continue
            found = f"{path}, line {line} has {len(row)} fields, the header has {len(header)}"
            yield line, Fault(f"{found}; put text that holds a {SEPARATORS[separator]} in double quotes.")
    except csv.Error as error:
        raise UserError(
            f"{path}, line {before + reader.line_num} cannot be read ({error}); expected {columns.listed} in CSV. Look "
            "for a quote that is not closed."
        ) from None


def separator_of(header: str, columns: Columns) -> str:
    """The separator by which a table's first line has most of the columns, and else most fields; the comma if all
    are equal."""

    def known_and_all(mark: str) -> tuple[int, int]:
        names = columns.spelled(next(csv.reader([header], delimiter=mark), []))
        return sum(name in columns.known for name in names), len(names)

    return max(SEPARATORS, key=known_and_all)


def refuse_start(path: Path) -> None:
    """Raise UserError for a file that cannot be read, a spreadsheet or archive, and UTF-16, by its first bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    _refuse_start(path, start)


def _refuse_start(path: Path, content: bytes) -> None:
    if content.startswith(_SPREADSHEET):
        raise UserError(f"{path} is a spreadsheet or an archive, expected text. Save the table as CSV in UTF-8.")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16, expected UTF-8. Save it as UTF-8 (in Excel: 'CSV UTF-8').")


def _not_utf_8(path: Path, line: int, byte: int) -> str:
    return (
        f"{path}, line {line} holds the byte 0x{byte:02x}, which is not UTF-8 (an older encoding "
        "such as cp1252?). Save the file as UTF-8 (in Excel: 'CSV UTF-8')."
    )


def shown(text: str) -> str:
    """A text cut to SHOWN characters, for messages."""
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
