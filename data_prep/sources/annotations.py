"""Further answers to test questions, read from the annotation files that the benchmarks' own scripts score with.

Supported are TextVQA (`data`: question_id, answers), VQAv2 (`annotations`: question_id, answers), VizWiz (a list of
image, answers), COCO captions (`annotations`: image_id, caption; `images`: id, file_name), and mappings from a
question's id to its answer, such as ScienceQA's problems (choices, index of the right one) and GQA's questions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.sources.text_files import read_text
from pipeline.errors import UserError
from pipeline.metrics.letters import LETTERS


@dataclass
class Annotation:
    """The annotation of one question: its answer, the annotators' answers, and its options."""

    answer: str | None = None
    answers: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)

    def meta(self) -> dict[str, Any]:
        """The fields for a sample's `meta`."""
        return {name: value for name in ("answers", "options") if (value := getattr(self, name))}

    def best_answer(self) -> str | None:
        """The answer, else the annotators' most frequent one (ties: the first)."""
        return self.answer or max(self.answers, key=self.answers.count, default=None)


class Annotations:
    """Annotations by a question's id, or by the name of its image file."""

    def __init__(self, by_key: dict[str, Annotation]) -> None:
        self._by_key = by_key

    def find(self, id_: str, image: str | None) -> Annotation | None:
        """Return the annotation of a question, None where there is none."""
        return self._by_key.get(id_) or self._by_key.get(PurePosixPath(image or "").name)


def read_annotations(path: Path) -> Annotations:
    """Return the annotations of a file in one of this module's formats; raises UserError for any other."""
    try:
        content = json.loads(read_text(path))
        by_key: dict[str, Annotation] = {}
        for key, annotation in _items(content):
            known = by_key.setdefault(key, annotation)
            if known is not annotation:  # COCO has one entry per caption
                known.answers += annotation.answers
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"The annotations {path} cannot be read ({type(error).__name__}: {error}); expected answers by question_id "
            "as in TextVQA, VQAv2, VizWiz, ScienceQA, GQA or COCO captions. Restore the file."
        ) from None
    return Annotations(by_key)


def _items(content: Any) -> Iterator[tuple[str, Annotation]]:
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        names = {str(image["id"]): PurePosixPath(image.get("file_name", "")).name for image in content["images"]}
        for entry in content["annotations"]:
            caption, id_ = Annotation(answers=[str(entry["caption"])]), str(entry["image_id"])
            yield id_, caption
            if names.get(id_):
                yield names[id_], Annotation(answers=[str(entry["caption"])])
    elif isinstance(content, list) or "data" in content or "annotations" in content:
        entries = content if isinstance(content, list) else content.get("data", content.get("annotations"))
        for entry in entries:
            key = str(entry["question_id"]) if "question_id" in entry else PurePosixPath(entry["image"]).name
            yield key, Annotation(answers=[text for answer in entry["answers"] if (text := _text(answer)) is not None])
    else:
        for id_, entry in content.items():
            options = [str(option) for option in entry.get("choices", ())]
            answer = entry["answer"]
            yield str(id_), Annotation(LETTERS[answer] if isinstance(answer, int) else _text(answer), options=options)


def _text(answer: Any) -> str | None:
    """The text of an answer; None for an empty cell, which pandas writes as NaN."""
    value = answer["answer"] if isinstance(answer, dict) else answer
    return None if value is None or value != value else str(value)
