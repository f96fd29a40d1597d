"""Reads tables in text files, a line or an entry at a time: CSV, JSON lines, and one JSON array of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources.text_files import Columns, Fault, csv_rows, lines_of, refuse_encoding
from data_prep.tables.rows import Row, Rows, named, require_image_column
from pipeline.errors import UserError

CHUNK = 1 << 18  # characters that are read at once
LONGEST = 1 << 26  # characters of one entry, beyond which a file is taken for damaged
_BETWEEN = " \t\r\n,"


def csv_table(path: Path, columns: Columns, separator: str | None) -> Rows:
    """The rows of a CSV file; see `csv_rows`."""
    for line, row in csv_rows(path, columns, separator):
        if isinstance(row, Fault):
            yield row
            continue
        require_image_column(str(path), list(row), columns)
        yield Row(f"{path}, line {line}", line, dict(row))


def json_lines(path: Path, columns: Columns) -> Rows:
    """The rows of a file with one JSON object a line."""
    for number, line in lines_of(path):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}); expected one object a line.") from None
        yield _row(where, number, record, columns, ", one object a line")


def json_array(path: Path, columns: Columns) -> Rows:
    """The rows of a file with one JSON array of objects, as pandas writes it with orient="records"."""
    for number, record in _entries(path):
        yield _row(f"{path}, entry {number}", number, record, columns, " in each entry")


def _row(where: str, number: int, record: Any, columns: Columns, each: str) -> Row:
    if not isinstance(record, dict):
        raise UserError(f"{where} holds no object; expected {{{', '.join(columns.known)}}}{each}.")
    names = columns.spelled(record)
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where} has {twice} more than once. Keep one of them.")
    if number == 1:
        named(where, list(record), columns, "fields that are called")
    require_image_column(where, names, columns)
    return Row(where, number, dict(zip(names, record.values(), strict=True)))


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Number from 1 and content of each entry of an array, read in chunks."""
    decoder, number, text, position, ended = json.JSONDecoder(), 1, "", 0, False
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(CHUNK).lstrip()[1:]  # without the bracket, by which the file was found to be an array
            while True:
                position = _skip(text, position)
                if position < len(text) and text[position] == "]":
                    if (text[position + 1 :] + file.read()).strip():
                        raise UserError(f"{path} has text behind its array; expected one JSON array of objects.")
                    return
                if position < len(text) and text[position] != "{":
                    raise UserError(f"{path}, entry {number} holds no object; expected an array of objects.")
                try:
                    if position == len(text):
                        raise ValueError("the file ends inside the array")
                    record, position = decoder.raw_decode(text, position)
                except (ValueError, RecursionError) as error:
                    more = "" if ended or len(text) - position > LONGEST else file.read(max(CHUNK, len(text)))
                    if not more:
                        raise UserError(
                            f"{path}, entry {number} is not JSON ({error}); expected an array of objects."
                        ) from None
                    text, position = text[position:] + more, 0
                    continue
                yield number, record
                number += 1
    except UnicodeDecodeError:
        refuse_encoding(path)
        raise


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _BETWEEN:
        position += 1
    return position
