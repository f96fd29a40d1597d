"""The kinds of questions in a task: the answer is yes or no, the letter of a choice, a number, or open."""

from __future__ import annotations

import re

YES_OR_NO, CHOICE, NUMBER, OPEN = "yes or no", "letter of a choice", "number", "open answer"
KINDS = (OPEN, CHOICE, YES_OR_NO, NUMBER)
LETTER = re.compile(r"\(?([A-Za-z])[).]?")
COUNT = re.compile(r"[-+]?\d+([.,]\d+)*")


def kind_of(question: str, answer: str) -> str:
    """The kind of one question, one of KINDS: a lone letter is a choice where the question lists it as an option."""
    plain = answer.strip()
    if plain.rstrip(".").lower() in ("yes", "no"):
        return YES_OR_NO
    letter = LETTER.fullmatch(plain)
    if letter is not None and re.search(rf"(?i)(?<!\w){letter[1]}\s?[.):]", question):
        return CHOICE
    return NUMBER if COUNT.fullmatch(plain) else OPEN
