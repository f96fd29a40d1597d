"""What the tests' task of lmms-eval makes of a document: its picture, its question, and whether an answer is right."""

from __future__ import annotations

from typing import Any


def picture_of(document: dict[str, Any]) -> list[Any]:
    """The document's pictures, of which `twice` has two."""
    picture = document["image"]
    return [] if picture is None else [picture.convert("RGB")] * (2 if document["twice"] else 1)


def question_of(document: dict[str, Any]) -> str:
    """The question."""
    return str(document["question"])


def scored(document: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """1 for an answer that equals the document's."""
    return {"right": float(answers[0] == document["answer"])}
