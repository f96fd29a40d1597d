"""Class names as token sequences, with the rows where learned context stands.

A text is tokenised whole; the first `length` positions after the start token are the learned ones, whatever words stand
there. With the class name in the middle or in front the same tokens are moved. Source: docs/design.md 5.3, 5.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pipeline.errors import UserError, nearest

Position = Literal["end", "middle", "front"]
MARK = "{}"  # where a template takes the class name


@dataclass(frozen=True)
class ClassTexts:
    """One text per class: `ids` [K, T], the rows of learned context `rows` [K, n], and the classes' names."""

    names: tuple[str, ...]
    ids: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> ClassTexts:
        return ClassTexts(self.names, self.ids.to(device), self.rows.to(device))


class Words:
    """A Hugging Face tokenizer as the text tower needs it: whole texts of at most `context_length` tokens.

    With `shorten` texts end at the longest one's last token instead of `context_length`: exact where attention is
    causal, since nothing before the end token sees what comes after it.
    """

    def __init__(self, tokenizer: Any, context_length: int, shorten: bool = True) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.shorten = shorten
        pad = tokenizer.pad_token_id
        self.pad: int = tokenizer.eos_token_id if pad is None else pad

    def whole(self, text: str) -> list[int]:
        """Ids of a text with its start and end tokens; UserError when it is longer than the tower reads."""
        ids = list(self.tokenizer(text)["input_ids"])
        if len(ids) > self.context_length:
            raise UserError(
                f"The text '{text}' has {len(ids)} tokens, the text tower reads {self.context_length}. Shorten the "
                "class name or the template, or set a smaller prompt length."
            )
        return ids

    def bare(self, text: str) -> list[int]:
        """Ids of a text without start and end tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def lead(self, ids: list[int]) -> int:
        """The number of tokens before the text itself: 1 with a start token, else 0."""
        return int(bool(ids) and ids[0] == self.tokenizer.bos_token_id)

    def padded(self, sequences: Sequence[list[int]]) -> Tensor:
        """Id sequences as one tensor [R, T]."""
        length = max(map(len, sequences)) if self.shorten else self.context_length
        return torch.tensor([ids + [self.pad] * (length - len(ids)) for ids in sequences])

    def first_ids(self, text: str, count: int) -> Tensor:
        """Ids of the first `count` tokens of a text after the start token; UserError when it has fewer."""
        ids = self.bare(text)
        if len(ids) < count:
            raise UserError(
                f"The prompt begins as the words '{text}', which are {len(ids)} tokens, but has {count} vectors. Give "
                f"more words or a prompt length of at most {len(ids)}."
            )
        return torch.tensor(ids[:count])


def readable(name: str) -> str:
    """A class name as it is read in a text: underscores are spaces."""
    return name.replace("_", " ")


def class_texts(
    words: Words, names: Sequence[str], template: str, length: int = 0, position: Position = "end"
) -> ClassTexts:
    """The texts of classes from a template with one `{}`; `length` positions after the start token are learned.

    Raises UserError for no class, an empty name, a template without `{}`, an unknown position, and a text that is too
    long.
    """
    if position not in get_args(Position):
        expected = ", ".join(get_args(Position)) + "." + nearest(position, get_args(Position))
        raise UserError(f"The context's position is '{position}'; expected one of {expected}")
    if MARK not in template:
        raise UserError(f"The template '{template}' does not say where the class name goes. Put {MARK} into it.")
    check_names(names)
    sequences, rows = [], []
    for name in map(readable, names):
        ids = words.whole(template.replace(MARK, name))
        lead, name_length = words.lead(ids), len(words.bare(name)) if position != "end" else 0
        before = {"end": length, "middle": length // 2, "front": 0}[position]
        start, context, rest = ids[:lead], ids[lead : lead + length], ids[lead + length :]
        if len(context) < length or len(rest) <= name_length:
            raise UserError(
                f"The text of class '{name}' has {len(ids)} tokens, too few for {length} learned positions and the "
                "name. Give a longer template or a smaller prompt length."
            )
        sequences.append(start + context[:before] + rest[:name_length] + context[before:] + rest[name_length:])
        rows.append([lead + k + (name_length if k >= before else 0) for k in range(length)])
    return ClassTexts(tuple(names), words.padded(sequences), torch.tensor(rows, dtype=torch.long))


def check_names(names: Sequence[str]) -> None:
    """Refuse a class list without classes, or with an empty name."""
    if not names:
        raise UserError("There are no classes; expected at least one name. Check the split file or class folders.")
    if any(not name.strip() for name in names):
        raise UserError(f"Class {[not name.strip() for name in names].index(True)} has an empty name. Give it one.")
