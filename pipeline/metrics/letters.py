"""Multiple choice: the letter of the option that a text chooses."""

import re
from typing import Any

LETTERS = "ABCDE"  # ScienceQA has at most five choices
_ANSWER_SENTENCE = re.compile(r"The answer is ([A-Z])\b")
_SINGLE_CHARACTER = re.compile(r"\b(\w)\b")


def option_letter(text: str, letters: str = LETTERS) -> str | None:
    """Return the letter of `letters` that a free text chooses, or None.

    In this order: the text is the letter; it starts with "X. "; exactly one sentence says "The answer is X"; the first
    single-character word is the letter. Source: ScienceQA evaluation of LLaVA and of CoIN (docs/design.md 6.1).
    """
    text = text.strip()
    sentences = _ANSWER_SENTENCE.findall(text)
    if len(sentences) == 1 and plain_letter(text) is None:
        return sentences[0] if sentences[0] in letters else None
    return first_letter(text, letters)


def first_letter(text: str, letters: str = LETTERS) -> str | None:
    """`option_letter` without the rule "The answer is X", which CoIN's script lacks; outer white space is kept."""
    word = _SINGLE_CHARACTER.search(text)
    chosen = plain_letter(text) or (word.group(1).upper() if word else "")
    return chosen if chosen and chosen in letters else None


def plain_letter(text: str) -> str | None:
    """The letter of a text that consists of one or starts with "X. "; else None."""
    return text[0] if text[:1] and text[0] in LETTERS and (len(text) == 1 or text[1:3] == ". ") else None


def choices(meta: dict[str, Any]) -> str:
    """The letters of a sample's choices: one for each of its `options` (or `choices`), five when it lists none."""
    return LETTERS[: len(_options(meta))] or LETTERS


def true_letter(answer: str, meta: dict[str, Any]) -> str | None:
    """The letter of the true answer, which is given as a letter or as the text of an option."""
    options = _options(meta)
    return LETTERS[options.index(answer)] if answer in options else option_letter(answer, choices(meta))


def _options(meta: dict[str, Any]) -> list[str]:
    return [str(option) for option in meta.get("options") or meta.get("choices") or ()][: len(LETTERS)]
