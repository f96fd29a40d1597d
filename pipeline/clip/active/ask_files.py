"""The files with which a run asks a person for labels: `ask.csv`, the images to look at, and the labels so far.

In the run's folder: `ask.csv` with the columns image, label and number, which the person fills in; `ask/` with what was
asked (`ask.json`), the pictures by number and contact sheets; `labels-<dataset>.csv`, all answers of finished rounds.
`ask.csv` is written last and removed last, so where it exists, everything that it refers to does too.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.clip.active.sheets import draw_sheets
from pipeline.clip.recipe_data import NONE_OF_THESE
from pipeline.errors import UserError, nearest
from pipeline.files.atomic import (
    empty_folder,
    remove_folder,
    replacing,
    sweep_temporaries,
    sync_folder,
    temporary_of,
    write_json,
)
from pipeline.runs.layout import ASK, ASK_FOLDER, labels_file

log = logging.getLogger(__name__)
QUESTION = "ask.json"
IMAGE, LABEL, NUMBER = "image", "label", "number"
COLUMNS = (IMAGE, LABEL, NUMBER)
SIDE = 1024  # most pixels of a side of the pictures in ask/
QUALITY = 90  # of their JPEG


@dataclass(frozen=True)
class Question:
    """The images that a round of a unit asks a person about, and the classes to choose from."""

    unit: str
    round: int  # from 1
    rounds: int
    dataset: str
    classes: tuple[str, ...]
    images: tuple[str, ...]

    @property
    def identity(self) -> str:
        """A hash that tells this question from that of another round."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    @classmethod
    def read(cls, run: Path) -> Question | None:
        """The question of a run folder; None where nothing is asked, UserError for a damaged file."""
        path = run / ASK_FOLDER / QUESTION
        if not (run / ASK).is_file() or not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
            lists = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
            return cls(**{**found, **lists})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} cannot be read ({error}). Remove the folder {run / ASK_FOLDER} and run the same command "
                f"again, which makes it anew and keeps the answers in {run / ASK}."
            ) from error


def picture_path(run: Path, number: int) -> Path:
    """The picture of the image with this number, from 1, in ask.csv."""
    return run / ASK_FOLDER / f"{number:04d}.jpg"


def write_question(run: Path, question: Question, pictures: Iterable[Image.Image]) -> None:
    """Write the pictures, upright and reduced, the contact sheets, and at last ask.csv.

    Labels are empty, or those of an ask.csv that is there for the same images. One for other images is renamed.
    """
    answers: list[str | None] = [None] * len(question.images)
    if (run / ASK).is_file():
        try:
            answers = read_answers(run, question)
            (run / ASK).unlink()
        except UserError:
            earlier = next(path for n in count(1) if not (path := run / f"ask-earlier-{n}.csv").exists())
            (run / ASK).rename(earlier)
            log.warning("%s was for other images than those asked for now; it is kept as %s.", run / ASK, earlier)
    folder = run / ASK_FOLDER
    sweep_temporaries(run)
    work = empty_folder(temporary_of(folder))
    paths = []
    for number, picture in enumerate(pictures, start=1):
        path = work / picture_path(run, number).name
        picture.thumbnail((SIDE, SIDE))
        picture.save(path, quality=QUALITY)
        paths.append(path)
    draw_sheets(paths, work)
    write_json(work / QUESTION, asdict(question))
    if folder.exists():
        remove_folder(folder)
    work.rename(folder)
    sync_folder(run)
    write_answers(run, question, answers)


def write_answers(run: Path, question: Question, answers: Sequence[str | None]) -> None:
    """Write ask.csv atomically with these answers, None or a class name for each image of the question."""
    rows = zip(question.images, answers, range(1, len(answers) + 1), strict=True)
    _write(run / ASK, COLUMNS, [(image, answer or "", number) for image, answer, number in rows])


def remove_question(run: Path) -> None:
    """Remove what was asked, once its answers are kept; ask.csv last but one, so that no half of it stays."""
    (run / ASK).unlink(missing_ok=True)
    if (run / ASK_FOLDER).exists():
        remove_folder(run / ASK_FOLDER)


def read_answers(run: Path, question: Question) -> list[str | None]:
    """The answer to each image of the question: a class name, `NONE_OF_THESE`, or None where there is none yet.

    Raises UserError, which names the line, for a table that cannot be read, an unknown class, an image that was not
    asked for or stands there twice, and for an image that is missing.
    """
    path, known = run / ASK, {_plain(name): name for name in (*question.classes, NONE_OF_THESE)}
    asked, found = set(question.images), dict[str, str | None]()
    for line, row in _rows(path, (IMAGE, LABEL)):
        image, label = row[IMAGE], row[LABEL].strip()
        if image not in asked:
            raise UserError(
                f"{path}, line {line} has the image '{image}', which this round did not ask for."
                f"{nearest(image, asked)} Remove the line, or correct the name."
            )
        if image in found:
            raise UserError(f"{path}, line {line} has the image '{image}' a second time; keep one of the two lines.")
        if label and _plain(label) not in known:
            raise UserError(
                f"{path}, line {line} has the class '{label}'; expected one of {', '.join(question.classes)}, or "
                f"{NONE_OF_THESE} for none of these.{nearest(label, question.classes)}"
            )
        found[image] = known[_plain(label)] if label else None
    missing = [image for image in question.images if image not in found]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of the {len(asked)} images that were asked for, the first is '{missing[0]}'; "
            "put its line back, with the label empty where it is not known yet."
        )
    return [found[image] for image in question.images]


def _plain(label: str) -> str:
    """A class name without regard to case, underscores and repeated blanks, as spreadsheets change them."""
    return " ".join(label.replace("_", " ").casefold().split())


def read_labels(run: Path, dataset: str, classes: Sequence[str]) -> dict[str, str]:
    """The answers of finished rounds by image; none where there is no file yet."""
    path = labels_file(run, dataset)
    if not path.is_file():
        return {}
    found = {row[IMAGE]: row[LABEL] for _, row in _rows(path, (IMAGE, LABEL))}
    other = [label for label in found.values() if label not in (*classes, NONE_OF_THESE)]
    if other:
        raise UserError(f"{path} has the class '{other[0]}', which is none of {', '.join(classes)}. Restore the file.")
    return found


def keep_labels(run: Path, dataset: str, labels: Mapping[str, str]) -> None:
    """Write the answers of all finished rounds atomically."""
    _write(labels_file(run, dataset), (IMAGE, LABEL), list(labels.items()))


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    with replacing(path) as temporary:
        temporary.write_text(file.getvalue(), "utf-8")


def _rows(path: Path, needed: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Line number and fields of each row of a CSV table as spreadsheets save it: with commas, semicolons or tabs."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8. Save it as CSV in UTF-8 (in Excel: 'CSV UTF-8').") from None
    first = text.partition("\n")[0]
    separator = next((mark for mark in ",;\t" if mark in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows = []
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        lacking = [name for name in needed if header.count(name) != 1]
        if lacking:
            raise UserError(
                f"{path} begins with '{first.strip()[:80]}'; expected a first line that names the columns "
                f"{' and '.join(needed)} once each. Put it back."
            )
        for row in reader:
            if not any(field.strip() for field in row):
                continue
            if len(row) < len(header):  # a spreadsheet leaves out empty fields at the end
                row += [""] * (len(header) - len(row))
            if any(field.strip() for field in row[len(header) :]):
                raise UserError(
                    f"{path}, line {reader.line_num} has {len(row)} fields, the header has {len(header)}; put text "
                    "that holds a separator in double quotes."
                )
            rows.append((reader.line_num, dict(zip(header, row, strict=False))))
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num} cannot be read ({error}). Look for a quote that is not closed."
        ) from None
    return rows
