"""Measures the lengths of prepared samples in tokens, without decoding images.

An image's number of tokens follows from its size in the index. A text has at most as many tokens as its JSON record has
bytes, so it is tokenised only where that bound exceeds the limit: most samples of typical data are not even read, and a
million take seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.conversation import Conversation
from pipeline.data.example import Length
from pipeline.data.image_sizes import ImageShape
from pipeline.data.sample import Sample
from pipeline.data.shards import IndexedShards
from pipeline.data.truncation import cut_to_fit
from pipeline.errors import UserError

READ_FOR_LONGEST = 512  # most records tokenised per split to find its longest sample, by descending characters
READ_ANSWERS = 2000  # most test answers read per split to count those that are too long
NAMED = 3  # samples named in a message
SLACK = 8  # tokens that the joints of text and template may add
# Factor by which a tokenizer's normaliser may lengthen a text in bytes, by its kind; others do not lengthen it.
GROWTH = (("NFK", 12), ("Precompiled", 12), ("NF", 3))


@dataclass(frozen=True)
class SplitLengths:
    """Lengths of the samples of one split; rows are counted from 0."""

    name: str
    count: int
    most: int  # model.max_length
    too_long: dict[int, int] = field(default_factory=dict)  # row -> tokens, more than `most`
    uncut: dict[int, str] = field(default_factory=dict)  # row -> why truncation of its question does not help
    refused: dict[int, str] = field(default_factory=dict)  # row -> why the processor refuses its image
    telling: tuple[int, ...] = ()  # rows with the most tokens, crops, pixels, and the largest aspect ratio
    longest: int = 0  # tokens of the longest sample that fits
    ids: Any = ()  # of the split, by row

    @property
    def misfits(self) -> list[int]:
        """Rows of samples that are too long or whose image is refused."""
        return sorted({*self.too_long, *self.refused})

    def sentences(self, too_long: str) -> list[str]:
        """Problems of the split under this value of data.too_long."""
        found = []
        if self.too_long and too_long == "refuse":
            rows = sorted(self.too_long, key=lambda row: -self.too_long[row])
            longest = self.too_long[rows[0]]
            found.append(
                f"{self.name}: {len(rows)} of {self.count} samples have more tokens than the {self.most} of "
                f"model.max_length ({self._named(rows)}; the longest has {longest} tokens). Raise model.max_length to "
                f"{longest}, lower model.image_tokens where images take most of it, or set data.too_long to skip or "
                "truncate."
            )
        if self.refused and too_long != "skip":
            rows = sorted(self.refused)
            found.append(f"{self.name}: {self.refused[rows[0]]}{_others(len(rows) - 1, 'such image')}")
        if self.uncut and too_long == "truncate":
            rows = sorted(self.uncut)
            found.append(f"{self.name}: {self.uncut[rows[0]]}{_others(len(rows) - 1, 'such sample')}")
        return found

    def _named(self, rows: list[int]) -> str:
        return ", ".join(f"'{self.ids[row]}'" for row in rows[:NAMED]) + " ..." * (len(rows) > NAMED)


def _others(count: int, what: str) -> str:
    return f" ({count} more {what}{'s' * (count > 1)})" if count else ""


def measure(
    shards: IndexedShards, conversation: Conversation, name: str, count: int | None = None, answered: bool = True
) -> SplitLengths:
    """Find the samples that are too long or whose image the processor refuses.

    Args:
        shards: the prepared split.
        conversation: turns samples into tokens.
        name: task and split, for messages.
        count: only the first samples; None: all.
        answered: include the answer, as in training; a test sample's answer is not part of the prompt.
    """
    count = min(count or len(shards), len(shards))
    images = _Images(shards, conversation, count)
    records = shards.json_sizes[:count]
    bounds = images.fixed + _growth(conversation.tokenizer) * records + SLACK
    most = conversation.max_length
    found = SplitLengths(name, count, most, ids=shards.ids)
    found.refused.update(images.refused)
    open_rows = np.ones(count, dtype=bool)
    open_rows[list(images.refused)] = False

    def length(row: int, sample: Sample) -> tuple[Sample, Length]:
        if not answered:
            sample = dataclasses.replace(sample, answer="", meta={})
        return sample, conversation.length(sample, images.size(row))

    longest, longest_row = 0, 0
    for row in np.flatnonzero(open_rows & (bounds > most)).tolist():
        if images.fixed[row] > most:  # the image alone has too many tokens
            found.too_long[row] = int(images.fixed[row])
            found.uncut[row] = _uncut(shards.ids[row], int(images.fixed[row]), most, int(images.tokens[row]))
            continue
        sample = shards.text(row)
        # No normaliser lengthens ASCII; reading a record costs a fraction of tokenising it.
        if images.fixed[row] + records[row] + SLACK <= most and sample.to_json().isascii():
            continue
        sample, tokens = length(row, sample)
        if tokens.all > most:
            found.too_long[row] = tokens.all
            size = images.size(row)
            if cut_to_fit(sample, lambda cut, size=size: conversation.length(cut, size).all, most) is None:  # type: ignore[misc]
                found.uncut[row] = _uncut(sample.id, tokens.all, most, tokens.image)
        elif tokens.all > longest:
            longest, longest_row = tokens.all, row
    open_rows[list(found.too_long)] = False
    for row in _by_characters(shards, images.fixed, open_rows):
        if bounds[row] <= longest:
            continue
        tokens = length(row, shards.text(row))[1]
        if tokens.all > longest:
            longest, longest_row = tokens.all, row
    telling = {longest_row, *images.telling(open_rows)} if open_rows.any() else set()
    return dataclasses.replace(found, telling=tuple(sorted(telling)), longest=longest)


class _Images:
    """Tokens, crops and values of a split's images, computed once per distinct size."""

    def __init__(self, shards: IndexedShards, conversation: Conversation, count: int) -> None:
        self._sizes = shards.sizes[:count]
        distinct, which = np.unique(self._sizes, axis=0, return_inverse=True)
        which = which.reshape(-1)
        around: dict[str, int] = {}  # tokens besides the image's, by the text that the processor writes for an image
        columns: dict[str, list[int]] = {name: [] for name in ("fixed", "tokens", "crops", "values")}
        refusals: dict[int, str] = {}
        for number, (width, height) in enumerate(distinct.tolist()):
            shape: ImageShape | None = None
            if width:
                try:
                    shape = conversation.image_shape(width, height, name="?")
                except UserError as error:
                    refusals[number] = str(error)
            text = "" if shape is None else shape.text
            if text not in around:
                blank = conversation.length(Sample("", None, "", ""), (width, height) if shape is not None else None)
                around[text] = blank.all - blank.image
            tokens = 0 if shape is None else shape.tokens
            columns["fixed"].append(around[text] + tokens)
            columns["tokens"].append(tokens)
            columns["crops"].append(0 if shape is None else shape.crops)
            columns["values"].append(0 if shape is None else shape.values)
        spread = {name: np.asarray(values, dtype=np.int64)[which] for name, values in columns.items()}
        self.fixed, self.tokens = spread["fixed"], spread["tokens"]  # [N]
        self._crops, self._values = spread["crops"], spread["values"]
        concerned = np.flatnonzero(np.isin(which, list(refusals))).tolist() if refusals else []
        self.refused = {row: refusals[int(which[row])].replace("'?'", f"'{shards.ids[row]}'") for row in concerned}

    def size(self, row: int) -> tuple[int, int] | None:
        """Width and height of a row's image; None without an image."""
        width, height = self._sizes[row].tolist()
        return (width, height) if width else None

    def telling(self, among: npt.NDArray[np.bool_]) -> Iterator[int]:
        """Rows with the most image tokens, crops, values and pixels, and with the largest aspect ratio."""
        sides = np.maximum(self._sizes.astype(np.int64), 1)
        ratio = sides.max(1) / sides.min(1)
        for column in (self.tokens, self._crops, self._values, sides.prod(1), ratio):
            yield int(np.argmax(np.where(among, column, -1)))


def _by_characters(shards: IndexedShards, fixed: npt.NDArray[np.int64], among: npt.NDArray[np.bool_]) -> list[int]:
    """The rows that are probably longest, in descending order."""
    guess = np.where(among, fixed + shards.lengths[: len(fixed)], -1)
    first = min(READ_FOR_LONGEST, len(guess))
    rows = np.argpartition(-guess, first - 1)[:first]
    rows = rows[guess[rows] >= 0]
    return rows[np.argsort(-guess[rows], kind="stable")].tolist()


def _growth(tokenizer: Any) -> int:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return max(factor for _, factor in GROWTH)
    said = str(backend.normalizer)
    return next((factor for name, factor in GROWTH if name in said), 1)


def _uncut(name: str, tokens: int, most: int, image: int) -> str:
    return (
        f"Sample '{name}' has {tokens} tokens, more than the {most} of model.max_length, and no cut of its question is "
        f"enough: its image takes {image}. Raise model.max_length, or lower model.image_tokens."
    )


def long_answers(
    shards: IndexedShards, conversation: Conversation, name: str, most: int, count: int | None = None
) -> str:
    """A warning where reference answers of tests have more tokens than `most`, the limit of generation; else "".

    Tokenises at most READ_ANSWERS answers, evenly over the split, and those with most characters.
    """
    count = min(count or len(shards), len(shards))
    looked = np.unique(np.linspace(0, count - 1, min(count, READ_ANSWERS)).astype(int)).tolist()
    longest = np.argsort(-shards.answer_chars[:count], kind="stable")[:NAMED].tolist()

    def tokens(row: int) -> int:
        return conversation.length(shards.text(row), None).answer if shards.answer_chars[row] else 0

    lengths = {row: tokens(row) for row in {*looked, *longest}}
    over = sum(lengths[row] > most for row in looked)
    if not over:
        return ""
    of = f"{count}" if len(looked) == count else f"{len(looked)} looked at (of {count})"
    most_of_all = max(lengths.values())
    return (
        f"{name}: {over} of {of} test answers are longer than the task's max_new_tokens {most} (longest {most_of_all} "
        f"tokens) and cannot be answered in full; set max_new_tokens to {most_of_all}."
    )
