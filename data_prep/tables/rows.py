"""What every kind of table is read as: rows with a place for messages, and names of columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from data_prep.sources.text_files import Columns, Fault
from pipeline.errors import UserError, nearest

LIKE_IMAGE = ("image", "img", "picture", "photo", "file", "path")  # parts of other names for the column `image`


@dataclass(frozen=True)
class Row:
    """One row of a table: where it is, for messages, its number, unique in its part, and its fields by name."""

    where: str
    number: int
    fields: dict[str, Any]


Rows: TypeAlias = Iterator["Row | Fault"]


def named(where: str, header: Sequence[str], columns: Columns, place: str) -> list[str]:
    """The header of a table as `columns` spells it; UserError where it lacks a column or has one twice.

    `where` names the table, `place` says what names the columns in it ("a first line that names").
    """
    names = columns.spelled(header)
    columns.require(where, names, place)
    require_image_column(where, names, columns)
    return names


def require_image_column(where: str, found: Sequence[str], columns: Columns) -> None:
    """Raise UserError when there is no column `image` but one with a similar name."""
    if "image" in found or "image" not in columns.optional:
        return
    for name in found:
        if name in columns.known or not name:
            continue
        if nearest("image", [name]) or any(part in name.lower() for part in LIKE_IMAGE):
            raise UserError(
                f"{where} has '{name}' and no image; did you mean image? Rename '{name}' to image, name it by "
                f"--columns image={name}, or remove it if the questions stand alone."
            )


def plain_number(value: Any) -> Any:
    """A number without the `.0` that programs write into a column of whole numbers with gaps; others as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
