"""Checks the rows of a user's table, one after the other: texts, and images as paths, bytes or records of both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from data_prep.sources.image_files import UnreadableError, check_image, read_image, why_missing
from data_prep.sources.text_files import SEPARATORS, Columns, Fault
from data_prep.tables.open import Reading, Table
from data_prep.tables.rows import Row
from pipeline.data.pictures import read_header
from pipeline.errors import PipelineError, UserError, UserErrors, nearest

COLUMNS = ("image", "question", "answer")
SHOWN_FAULTS = 20  # lines that an error message lists


def reading_of(named: Sequence[str] = (), separator: str | None = None, sheet: str | None = None) -> Reading:
    """How the table of a task is read; UserError for an option that cannot be meant.

    Args:
        named: the table's own names of columns, as "image=photo,question=prompt" or one in each text.
        separator: of CSV, a character or "tab"; None: found by the header.
        sheet: of a workbook with several.
    """
    called: dict[str, str] = {}
    for text in (part for texts in named for part in texts.split(",")):
        name, equals, theirs = (word.strip() for word in text.partition("="))
        if not equals or not theirs:
            raise UserError(f"--columns has '{text}'; expected NAME=COLUMN, such as image=photo.")
        if name not in COLUMNS:
            raise UserError(f"--columns names '{name}'; expected {', '.join(COLUMNS)}.{nearest(name, COLUMNS)}")
        if name in called or theirs in called.values():
            raise UserError(f"--columns has {name if name in called else theirs} more than once; name each once.")
        called[name] = theirs
    if separator is not None:
        known = {word: mark for mark, word in SEPARATORS.items()} | {mark: mark for mark in SEPARATORS} | {"\\t": "\t"}
        if separator not in known:
            raise UserError(
                f"--separator is '{separator}'; expected {', '.join(SEPARATORS.values())}, or its character."
            )
        separator = known[separator]
    return Reading(Columns(COLUMNS[1:], COLUMNS[:1], called, option="--columns"), separator, sheet)


@dataclass(frozen=True)
class Checked:
    """One checked row; `image` is the path that its image gets below the task's images, None for no image."""

    number: int
    image: str | None
    question: str
    answer: str
    group: bytes  # the same for all rows with the same image, and for all with the same question and none
    source: Path | bytes | None = None  # the image's file, or its bytes


class BadImageError(PipelineError):
    """An image cannot be used; the message is a clause that follows the place of its row."""


@dataclass
class Rows:
    """The rows of a table, checked anew at each pass; what is known of images is kept between passes.

    Args:
        table: as `open_table` returns it.
        images: folder at which image paths start; None: images are in the table, or beside a dataset.
    """

    table: Table
    images: Path | None
    # By the path in the table: the path in the folder, and the hash.
    _by_path: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    _decoded: set[bytes] = field(default_factory=set)  # hashes of images that lie in the table

    def checked(self, part: str) -> Iterator[Checked]:
        """The rows of one part; raises UserErrors with a sentence for each of the first that cannot be used."""
        faults: list[str] = []
        count = 0
        for row in self.table.rows(part):
            found = row.sentence if isinstance(row, Fault) else self._check(row)
            if isinstance(found, str):
                count += 1
                faults += [found] if count <= SHOWN_FAULTS else []
            elif not count:
                yield found
        if count:
            more = count - SHOWN_FAULTS
            raise UserErrors([*faults, *([f"And {more} more lines."] if more > 0 else [])])

    def _check(self, row: Row) -> Checked | str:
        """The row, or the sentence that says why it cannot be used."""
        texts = {}
        for name in COLUMNS[1:]:
            try:
                texts[name] = _text(row.fields.get(name))
            except UserError as error:
                return f"{row.where}: {name} is {error}."
        missing = [name for name, text in texts.items() if not text]
        if missing:
            return f"{row.where} has no {' and no '.join(missing)}; add it or remove the line."
        question = texts["question"]
        try:
            image, group, source = self._image(row.fields.get("image"))
        except BadImageError as error:
            return f"{row.where}: the image {error}"
        except UserError as error:
            return f"{row.where}: image is {error}."
        group = b"image" + group if image else b"text" + hashlib.sha256(question.encode()).digest()
        return Checked(row.number, image, question, texts["answer"], group, source)

    def _image(self, value: Any) -> tuple[str | None, bytes, Path | bytes | None]:
        """Path below the task's images, hash and source of an image, which is decoded once as a check."""
        if isinstance(value, list):
            if len(value) > 1:
                raise BadImageError(f"is a list of {len(value)} images; expected one image for each question.")
            value = value[0] if value else None
        if isinstance(value, dict) and set(value) >= {"bytes", "path"}:  # an image as `datasets` stores it
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if isinstance(value, bytes):
            return self._embedded(value)
        path = _text(value)
        return self._file(path) if path else (None, b"", None)

    def _embedded(self, content: bytes) -> tuple[str, bytes, bytes]:
        digest = hashlib.sha256(content).digest()
        if digest not in self._decoded:
            try:
                check_image(content)
            except UnreadableError as error:
                raise BadImageError(f"in the table {error}") from None
            self._decoded.add(digest)
        return f"{digest.hex()[:32]}.{read_header(content).format.lower()}", digest, content

    def _file(self, image: str) -> tuple[str, bytes, Path]:
        folder = self.images
        if folder is None:
            folder = self.table.path if self.table.path.is_dir() else None
            if folder is None or not (folder / image).is_file():
                why = why_missing([folder] if folder else [], image)
                raise BadImageError(
                    f"'{image}' {why or 'is a path; expected --images, the folder that the image paths start at.'}"
                )
        known = self._by_path.get(image)
        if known is not None:
            return known[0], known[1], folder / known[0]
        inside = folder.resolve()
        try:
            path = (folder / image).resolve()
            if not path.is_relative_to(inside):
                raise BadImageError(f"'{image}' is outside {folder}; expected a path inside it.")
            why = None if path.is_file() else why_missing([folder], image) or "does not exist. Put it there."
            encoded = b"" if why else read_image(path)
        except (OSError, ValueError) as error:  # the name is too long or has a null byte
            why = f"cannot be read ({error}). Correct the path."
        except UnreadableError as error:
            why = str(error)
        if why is not None:
            raise BadImageError(f"'{image}' {why}")
        place = path.relative_to(inside).as_posix()
        self._by_path[image] = (place, hashlib.sha256(encoded).digest())
        return place, self._by_path[image][1], path


def _text(value: Any) -> str:
    """A field as text; "" for an empty cell, which pandas writes as NaN. UserError for anything but one value."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise UserError(f"{type(value).__name__}, expected text or a number")
    return str(value).strip()
