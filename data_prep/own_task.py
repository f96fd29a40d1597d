"""A task from the user's own data: converts a folder of images and a table of questions and answers to CoIN layout."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sources.image_files import UnreadableError, read_image, why_missing
from data_prep.sources.text_files import Fault, column, csv_rows, lines_of, read_text
from pipeline.config.base import NAME_LETTERS, NAME_PATTERN
from pipeline.config.task_file import TASK_FILE
from pipeline.errors import UserError, UserErrors, nearest, require_extras
from pipeline.files.atomic import write_json
from pipeline.metrics.scoring import metric_names

COLUMNS = ("image", "question", "answer")
LIKE_IMAGE = ("image", "img", "picture", "photo", "file", "path")  # parts of other names for the column `image`
SHOWN_FAULTS = 20  # lines that an error message lists
FEWEST = 4  # samples that are needed for two splits


@dataclass(frozen=True)
class Row:
    """One checked line of the table; `image` is a path relative to the folder of images, None for no image."""

    line: int
    image: str | None
    question: str
    answer: str
    content: str = ""  # hash of the image's bytes


def make_task(
    name: str,
    images: Path,
    table: Path,
    root: Path,
    test_share: float = 0.2,
    metric: str = "exact_ci",
    max_new_tokens: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Write `root`/instructions/`name`/{train,test,task}.json, copies of the images, and a sheet of ten samples.

    All samples of one image are in the same split. Raises UserError, or UserErrors with a message per line of the
    table, for data that cannot be used; nothing is written then.

    Args:
        name: name of the task.
        images: folder at which the table's image paths start.
        table: CSV with a header, or JSONL; the fields are image, question and answer.
        root: folder in CoIN layout that gets the task.
        test_share: share of the samples for the test split.
        metric: the task's metric.
        max_new_tokens: longest answer in tokens.
        seed: for the assignment of images to splits.
    """
    if metric not in metric_names():
        known = ", ".join(metric_names())
        raise UserError(f"unknown metric '{metric}'; expected one of {known}.{nearest(metric, metric_names())}")
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(f"'{name}' cannot name a task; expected {NAME_LETTERS}.")
    target = root / "instructions" / name
    if target.exists():
        raise UserError(f"{target} is there already; choose another name or --root, or remove that folder.")
    if not images.is_dir():
        raise UserError(
            f"--images: '{images}' is no folder; expected the folder that the table's image paths start at."
        )
    require_extras("report")  # matplotlib, for the sheet; raised before anything is written
    rows = _checked(images, table)
    test = _test_rows(rows, test_share, seed)
    splits = {"train": [row for row in rows if row not in test], "test": [row for row in rows if row in test]}
    for row in rows:
        if row.image is not None:
            copy = root / "images" / name / row.image
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((images / row.image).read_bytes())
    target.mkdir(parents=True)
    for split, members in splits.items():
        write_json(target / f"{split}.json", [_entry(name, row, split) for row in members])
    write_json(target / TASK_FILE, {"name": name, "metric": metric, "max_new_tokens": max_new_tokens})
    from data_prep.sheet import draw_sheet  # here: matplotlib, which is slow to import, only for a table that is right

    sheet = draw_sheet(
        [(images / row.image if row.image else None, row.question, row.answer) for row in _spread(rows, 10)],
        root / "sheets" / f"{name}.png",
    )
    return {
        "task": name,
        "root": str(root),
        "train": len(splits["train"]),
        "test": len(splits["test"]),
        "pictures": len({row.image for row in rows} - {None}),
        "answers": len({row.answer for row in rows}),
        "metric": metric,
        "sheet": str(sheet),
        **_long_answers(splits["test"], max_new_tokens),
    }


def _long_answers(test: list[Row], most: int) -> dict[str, str]:
    """A warning about test answers of more than `most` tokens, counted in words, as a word has at least one token."""
    words = [len(row.answer.split()) for row in test]
    over = sum(count > most for count in words)
    if not over:
        return {}
    return {
        "long_answers": (
            f"{over} of {len(words)} test answers have more words than the {most} tokens of max_new_tokens (the "
            f"longest {max(words)} words), so they cannot be answered in full; set --max-new-tokens higher."
        )
    }


def _checked(images: Path, table: Path) -> list[Row]:
    """The rows of the table, their images decoded as a check; UserErrors that name every line that cannot be used."""
    rows, faults = list[Row](), list[str]()
    known: dict[str, tuple[str, str]] = {}  # by the path in the table: the path in the folder, and the hash
    inside = images.resolve()
    for line, record in _records(table):
        where = f"{table}, line {line}"
        if isinstance(record, Fault):
            faults.append(record.sentence)
            continue
        texts = {}
        for name in COLUMNS:
            try:
                texts[name] = _text(record.get(name))
            except UserError as error:
                faults.append(f"{where}: {name} is {error}.")
        if len(texts) < len(COLUMNS):
            continue
        missing = [name for name in ("question", "answer") if not texts[name]]
        if missing:
            faults.append(f"{where} has no {' and no '.join(missing)}; add it or remove the line.")
            continue
        image = texts["image"]
        if image and image not in known:
            try:
                path = (images / image).resolve()
                if not path.is_relative_to(inside):
                    faults.append(f"{where}: the image '{image}' is outside {images}; expected a path inside it.")
                    continue
                why = None if path.is_file() else why_missing([images], image) or "does not exist. Put it there."
                encoded = b"" if why else read_image(path)
            except (OSError, ValueError) as error:  # the name is too long or has a null byte
                why = f"cannot be read ({error}). Correct the path."
            except UnreadableError as error:
                why = str(error)
            if why is not None:
                faults.append(f"{where}: the image '{image}' {why}")
                continue
            known[image] = (path.relative_to(inside).as_posix(), hashlib.sha256(encoded).hexdigest())
        place, content = known.get(image, (None, ""))
        rows.append(Row(line, place, texts["question"], texts["answer"], content))
    if faults:
        more = len(faults) - SHOWN_FAULTS
        raise UserErrors([*faults[:SHOWN_FAULTS], *([f"And {more} more lines."] if more > 0 else [])])
    if len(rows) < FEWEST:
        raise UserError(f"{table} has {len(rows)} samples; expected at least {FEWEST}, to train and to test with.")
    return rows


def _records(table: Path) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """Line number and fields of every record of a CSV or JSONL file."""
    text = read_text(table)
    if table.suffix.lower() not in (".jsonl", ".ndjson") and not text.lstrip().startswith("{"):
        for number, row in csv_rows(table, ("question", "answer"), ("image",)):
            if isinstance(row, dict):
                _require_image_field(str(table), list(row))
            yield number, row
        return
    for number, line in lines_of(table):
        where = f"{table}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error}); expected one object a line.") from None
        if not isinstance(record, dict):
            raise UserError(f"{where} holds no object; expected {{image, question, answer}}, one object a line.")
        names = [column(name, COLUMNS) for name in record]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{where} has {twice} more than once. Keep one of them.")
        fields = dict(zip(names, record.values(), strict=True))
        _require_image_field(where, names)
        yield number, fields


def _text(value: Any) -> str:
    """A field as text; "" for an empty cell, which pandas writes as NaN. UserError for anything but one value."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{type(value).__name__}, expected text or a number")
    return str(value).strip()


def _require_image_field(where: str, found: list[str]) -> None:
    """Raise UserError when there is no field `image` but one with a similar name."""
    if "image" in found:
        return
    for name in found:
        if name not in COLUMNS and (nearest("image", [name]) or any(part in name.lower() for part in LIKE_IMAGE)):
            raise UserError(
                f"{where} has '{name}' and no image; did you mean image? Rename '{name}' to image, or remove it if the "
                "questions stand alone."
            )


def _test_rows(rows: list[Row], share: float, seed: int) -> set[Row]:
    """About `share` of the rows, drawn by images, so that no image is both in training and in test."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.content or f"text {row.question}", []).append(row)
    if len(groups) < 2:
        raise UserError("all samples show the same image; expected at least two images, one to train and one to test.")
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    chosen: set[Row] = set()
    for key in order[:-1]:  # at least one image is left for training
        if chosen and len(chosen) >= share * len(rows):
            break
        chosen.update(groups[key])
    return chosen


def _entry(name: str, row: Row, split: str) -> dict[str, Any]:
    image = {} if row.image is None else {"image": f"images/{name}/{row.image}"}
    identity = f"{name}-{row.line}"
    if split == "test":
        return {"question_id": identity, **image, "text": row.question, "answer": row.answer}
    asked = f"<image>\n{row.question}" if image else row.question
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": row.answer}]
    return {"id": identity, **image, "conversations": turns}


def _spread(rows: list[Row], count: int) -> Iterable[Row]:
    """`count` rows, evenly spaced over the table."""
    step = max(1, len(rows) // count)
    return rows[::step][:count]
