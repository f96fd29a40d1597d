"""A second score of an answer that ignores its format: letter case, punctuation, articles and wrapping words.

Much of what a model seems to have forgotten is the way in which a task wants its answers written, not the answer.
Beside a task's metric, this score says how much.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from pipeline.metrics.answers import Meta, references
from pipeline.metrics.evalai import ARTICLES
from pipeline.metrics.metric import Answered, Metric, PerAnswer, TaskScore, percent

# Punctuation that carries meaning, and marks that Unicode counts among symbols although texts are wrapped in them.
KEPT, WRAPPING = "%&@#", "`^~|<>"
DELETED = "'\u2019"  # apostrophes: "it's" and "its" are one word
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_IN_A_NUMBER = re.compile(r"(?<=\d)[.:/-](?=\d)|(?<!\S)-(?=\d)|(?<![\w.])\.(?=\d)")  # 2.5, 1:3, 1/2, -4, .5
_ABBREVIATED = re.compile(r"\b(?:[^\W\d_]\.){2,}")  # U.S.
# What may stand in front of an answer, and behind it, after letter case, punctuation and articles are gone.
_LEADING = tuple(
    tuple(words.split())
    for words in (
        *("correct answer is", "final answer is", "right answer is", "best answer is", "my answer is", "answer is"),
        *("correct answer", "final answer", "short answer", "answer", "option", "choice"),
        *("it is", "its", "it was", "this is", "that is", "thats", "there is", "theres", "there are"),
        *("they are", "theyre", "these are", "those are", "i think", "i see", "we see", "you can see"),
        *("image shows", "picture shows", "photo shows", "image is of", "picture is of", "photo is of"),
        *("image of", "picture of", "photo of", "in image", "in picture", "in photo", "sure", "so"),
    )
)
_TRAILING = tuple(
    tuple(words.split())
    for words in (
        *("is correct answer", "is right answer", "is answer", "is correct", "is right"),
        *("in image", "in picture", "in photo", "in this image", "in this picture", "in this photo"),
    )
)


def plain(text: str) -> str:
    """A text without its format.

    In this order: compatibility forms of characters as the common one (full-width letters), letter case; commas between
    thousands, apostrophes and the full stops of an abbreviation are deleted; all other punctuation becomes a space,
    except inside a number (2.5, 1:3, 1/2, -4) and except the signs % & @ #; the articles a, an and the before another
    word (a last "A" is a choice); then wrapping words in front and behind ("the answer is", "it is", "in the image"),
    as long as something remains. Number words are not digits, and words in the middle stay: an answer of many words
    equals another only as a whole.
    """
    text = _THOUSANDS.sub("", unicodedata.normalize("NFKC", text).casefold())
    text = _ABBREVIATED.sub(lambda found: found[0].replace(".", ""), text.translate(dict.fromkeys(map(ord, DELETED))))
    whole = {found.start() for found in _IN_A_NUMBER.finditer(text)}
    marked = (letter if place in whole or not _is_mark(letter) else " " for place, letter in enumerate(text))
    words = "".join(marked).split()
    return " ".join(_unwrapped([word for word in words[:-1] if word not in ARTICLES] + words[-1:]))


def format_free(prediction: str, answer: str, meta: Meta | None = None) -> float:
    """1 where the prediction is one of the true answers but for its format, else 0; an empty one is no answer."""
    found = plain(prediction)
    return float(bool(found) and any(found == plain(text) for text in references(answer, meta or {})))


def format_free_percent(metric: Metric, answered: Sequence[Answered], scored: TaskScore) -> float:
    """The format-free score of a test set in percent, never below that of its metric.

    An answer counts with its points by the metric, or in full where it is right but for its format. A metric of whole
    test sets, such as CIDEr, compares words without their format by itself: it has only the one score.
    """
    if not isinstance(metric, PerAnswer):
        return scored.percent
    points = zip(scored.points, answered, strict=True)
    return percent([max(point, format_free(one.prediction, one.answer, one.meta)) for point, one in points])


def _is_mark(letter: str) -> bool:
    return letter not in KEPT and (letter in WRAPPING or unicodedata.category(letter).startswith("P"))


def _unwrapped(words: list[str]) -> list[str]:
    """The words without wrapping ones at both ends, which are taken off until none is left."""
    while True:
        shorter = next((words[len(lead) :] for lead in _LEADING if _begins(words, lead)), None)
        if shorter is None:
            shorter = next((words[: -len(tail)] for tail in _TRAILING if _begins(words[::-1], tail[::-1])), None)
        if shorter is None:
            return words
        words = shorter


def _begins(words: Sequence[str], lead: Sequence[str]) -> bool:
    return len(words) > len(lead) and tuple(words[: len(lead)]) == tuple(lead)
