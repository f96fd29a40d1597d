"""Parses one JSON entry of a CoIN file, a training conversation or a test question, and checks its fields."""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import Any

from data_prep.sources.annotations import Annotations
from data_prep.sources.base import Entry, UnusableError
from data_prep.sources.image_files import IMAGE_SUFFIXES

IMAGE_TAG = "<image>"
SPEAKERS = ("human", "gpt")
# Other projects' names of the field `image`; an entry with one of them would silently be used without its image.
OTHER_IMAGE_KEYS = frozenset(
    (
        "images",
        "img",
        "imgs",
        "image_path",
        "image_paths",
        "image_file",
        "image_files",
        "image_name",
        "img_path",
        "picture",
        "photo",
        "pic",
    )
)


def read_entry(raw: Any, file: str, number: int, known: Annotations | None) -> Entry:
    """Parse the `number`-th entry of a file; a test question is completed by its annotation.

    Raises UnusableError that says what was expected.
    """
    if not isinstance(raw, dict):
        raise UnusableError(f"found {type(raw).__name__}, expected an object with id, conversations and image.")
    image = raw.get("image") or None
    if image is not None and not isinstance(image, str):
        raise UnusableError(f"image is {type(image).__name__}, expected one path relative to the root.")
    if image is None:
        _refuse_other_keys(raw)
    if "conversations" in raw:
        id_, turns = _text(raw, "id"), _turns(raw["conversations"])
        (question, answer), more = turns[0], turns[1:]
        meta = {key: value for key, value in raw.items() if key not in ("id", "image", "conversations")}
        if more:
            meta["turns"] = [{"question": asked, "answer": answered} for asked, answered in more]
    else:
        id_, question = _text(raw, "question_id"), _without_tag(_text(raw, "text"))
        meta = {key: value for key, value in raw.items() if key not in ("question_id", "image", "text", "answer")}
        annotation = known.find(id_, image) if known else None
        if annotation is not None:
            meta = {**annotation.meta(), **meta}
            if raw.get("answer") in (None, ""):
                raw = {**raw, "answer": annotation.best_answer()}
        answer = _text(raw, "answer")
    if not answer.strip():
        raise UnusableError("its answer is empty. Add the answer.")
    return Entry(file, record_name(raw, number), id_, image, question, answer, meta)


def _turns(conversation: Any) -> list[tuple[str, str]]:
    expected = "expected turns {from: human, value} and {from: gpt, value} in alternation"
    if not isinstance(conversation, list) or not conversation or len(conversation) % 2:
        raise UnusableError(f"conversations is not a list of question and answer pairs; {expected}.")
    texts = []
    for number, turn in enumerate(conversation):
        speaker = SPEAKERS[number % 2]
        found = turn.get("from") if isinstance(turn, dict) else None
        if found not in SPEAKERS:
            raise UnusableError(f"turn {number} of conversations has the unknown role {found!r}; {expected}.")
        if found != speaker:
            raise UnusableError(f"turn {number} of conversations is not from {speaker}; {expected}.")
        text = _text(turn, "value", f"turn {number}: ")
        if speaker == "gpt" and not text.strip():
            raise UnusableError(f"turn {number}: its answer is empty. Add the answer.")
        texts.append(text)
    return [(_without_tag(asked), answered) for asked, answered in zip(texts[::2], texts[1::2], strict=True)]


def _text(raw: dict[str, Any], key: str, place: str = "") -> str:
    value = raw.get(key)
    if value is None:
        found = ", ".join(str(name) for name in raw if raw[name] is not None) or "nothing"
        raise UnusableError(f"{place}{key} is missing (found {found}). Add it to the entry.")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UnusableError(f"{place}{key} is {type(value).__name__}, expected text or a number.")
    if isinstance(value, float) and not math.isfinite(value):
        raise UnusableError(f"{place}{key} is {value} (pandas writes NaN for an empty cell). Fill it in.")
    text = str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UnusableError(
            f"{place}{key} holds half a surrogate pair, which is no valid text. Correct the file."
        ) from None
    return text


def _refuse_other_keys(raw: dict[str, Any]) -> None:
    """Raise UnusableError for an entry without `image` that has an image under another name."""
    for name, value in raw.items():
        named = name.strip().lower() in OTHER_IMAGE_KEYS and bool(value)
        if name != "image" and (named or _is_image_path(value)):
            raise UnusableError(f"it has {name} and no image; did you mean image? Write image: one path, for {name}.")


def _is_image_path(value: Any) -> bool:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return isinstance(value, str) and PurePosixPath(value).suffix.lower() in IMAGE_SUFFIXES


def _without_tag(question: str) -> str:
    # The conversation template places the image, so the tag in the text is removed.
    return question.replace(IMAGE_TAG, "").strip()


def record_name(raw: Any, number: int) -> str:
    """Return an entry's place in the file and its id, for messages."""
    id_ = raw.get("id", raw.get("question_id")) if isinstance(raw, dict) else None
    return f"entry {number}" + (f" (id {str(id_)!r})" if isinstance(id_, str | int) else "")
