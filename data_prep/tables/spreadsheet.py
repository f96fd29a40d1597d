"""Reads a sheet of an .xlsx workbook, a row at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openpyxl import load_workbook

from data_prep.sources.text_files import Columns, Fault
from data_prep.tables.rows import Row, Rows, named, plain_number
from pipeline.errors import UserError, nearest

ERROR = "e"  # openpyxl's type of a cell that holds an error, such as #N/A


def workbook_rows(path: Path, columns: Columns, sheet: str | None) -> Rows:
    """The rows of a sheet, None: of the only one. The first row that is not empty names the columns."""
    try:
        book = load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # openpyxl raises what zipfile, its XML parser and its own checks raise
        raise UserError(
            f"{path} cannot be read as a workbook ({type(error).__name__}: {error}); expected an .xlsx file. Save it "
            "again, or as CSV in UTF-8."
        ) from None
    try:
        yield from _rows(path, _sheet(path, book, sheet), columns)
    finally:
        book.close()


def _sheet(path: Path, book: Any, name: str | None) -> Any:
    names = [sheet.title for sheet in book.worksheets]
    if name is None and len(names) > 1:
        raise UserError(f"{path} has the sheets {', '.join(names)}; name the one with the samples by --sheet.")
    if name is not None and name not in names:
        raise UserError(f"{path} has no sheet '{name}'; it has {', '.join(names) or 'none'}.{nearest(name, names)}")
    return book[names[0] if name is None else name]


def _rows(path: Path, sheet: Any, columns: Columns) -> Rows:
    sheet.reset_dimensions()  # what the file says of its own size may be wrong
    filled = _filled(path, sheet)
    number, header = next(filled, (1, []))
    names = named(f"{path}, row {number}", [_text(cell) for cell in header], columns, "a first row that names")
    for number, cells in filled:
        where = f"{path}, row {number}"
        if any(cell.value is not None for cell in cells[len(names) :]):
            yield Fault(f"{where} has values right of the {len(names)} columns that the first row names. Name them.")
            continue
        fields: dict[str, Any] = dict.fromkeys(names) | dict(zip(names, cells, strict=False))
        broken = next((name for name in columns.known if getattr(fields.get(name), "data_type", "") == ERROR), None)
        if broken is not None:
            yield Fault(f"{where}: {broken} is the error {fields[broken].value}; correct the formula.")
            continue
        yield Row(where, number, {name: _value(cell) for name, cell in fields.items() if name})


def _filled(path: Path, sheet: Any) -> Iterator[tuple[int, list[Any]]]:
    """Number from 1 and cells of the rows that are not empty."""
    rows = sheet.iter_rows()
    for number in itertools.count(1):
        try:
            cells = next(rows, None)
        except Exception as error:  # damaged inside: what the XML parser and the conversion of values raise
            raise UserError(
                f"{path}, row {number} cannot be read ({type(error).__name__}: {error}). Save the workbook again, or "
                "as CSV in UTF-8."
            ) from None
        if cells is None:
            return
        if any(_text(cell) for cell in cells):
            yield number, list(cells)


def _value(cell: Any) -> Any:
    return None if cell is None else plain_number(cell.value)


def _text(cell: Any) -> str:
    return "" if cell.value is None else str(cell.value).strip()
