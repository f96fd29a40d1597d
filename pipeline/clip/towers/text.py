"""Class texts as token sequences, and the positions of the learned context in them.

A text is tokenised as a whole. The first `length` positions after the start token are learned, whichever tokens are
there. For a class name in the middle or in front the same tokens are reordered (docs/design.md 5.1, 5.3).
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
    """One text per class: the class names, token ids `ids` [K, T], and positions `rows` [K, n] of the context.

    `averaged` [M, K, T] are the ids of M texts per class whose mean token embedding stands for that of `ids`.
    """

    names: tuple[str, ...]
    ids: Tensor
    rows: Tensor
    averaged: Tensor | None = None

    def to(self, device: torch.device) -> ClassTexts:
        """The same texts on another device."""
        averaged = None if self.averaged is None else self.averaged.to(device)
        return ClassTexts(self.names, self.ids.to(device), self.rows.to(device), averaged)


class Words:
    """A Hugging Face tokenizer for the text tower, which reads at most `context_length` tokens.

    With `shorten` texts are padded to the longest one instead of `context_length`. Under causal attention this is
    exact, because padding comes after the end token, whose state is the feature.
    """

    def __init__(self, tokenizer: Any, context_length: int, shorten: bool = True) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.shorten = shorten
        pad = tokenizer.pad_token_id
        self.pad: int = tokenizer.eos_token_id if pad is None else pad

    def whole(self, text: str) -> list[int]:
        """Ids of a text with start and end token; UserError when they are more than the tower reads."""
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
        """The number of tokens before the text itself: 1 for tokenizers with a start token, else 0."""
        return int(bool(ids) and ids[0] == self.tokenizer.bos_token_id)

    def padded(self, sequences: Sequence[list[int]]) -> Tensor:
        """Id sequences as one padded tensor [R, T]."""
        length = max(map(len, sequences)) if self.shorten else self.context_length
        return torch.tensor([ids + [self.pad] * (length - len(ids)) for ids in sequences])

    def first_ids(self, text: str, count: int) -> Tensor:
        """Ids of the first `count` tokens of a text after the start token; UserError when it has fewer."""
        ids = self.bare(text)
        if len(ids) < count:
            raise UserError(
                f"The prompt is initialised from the words '{text}', which are {len(ids)} tokens, but has {count} "
                f"vectors. Give more words or a prompt length of at most {len(ids)}."
            )
        return torch.tensor(ids[:count])


def readable(name: str) -> str:
    """A class name as it appears in a text: with spaces for underscores."""
    return name.replace("_", " ")


def class_texts(
    words: Words, names: Sequence[str], template: str, length: int = 0, position: Position = "end"
) -> ClassTexts:
    """The texts of the classes.

    Args:
        words: the tokenizer.
        names: the class names.
        template: the text, with one `{}` for the class name.
        length: the number of learned positions after the start token.
        position: where the class name is, seen from the learned positions; see `CoOp`.

    Raises:
        UserError: no class, an empty name, a template without `{}`, an unknown position, or a text that is too long.
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


def averaged_texts(words: Words, names: Sequence[str], templates: Sequence[str]) -> ClassTexts:
    """Texts whose token embeddings are the mean over the templates, with the end position of the last template.

    Templates of different lengths are averaged position by position, padding included, and end where the last one
    does: nothing after the end position is read.
    """
    last = class_texts(words, names, templates[-1])
    length = last.ids.shape[1]
    rows = [[words.whole(template.replace(MARK, readable(name))) for name in names] for template in templates]
    padded = [[(ids + [words.pad] * length)[:length] for ids in part] for part in rows]
    return ClassTexts(last.names, last.ids, last.rows, torch.tensor(padded))


def check_names(names: Sequence[str]) -> None:
    """Raise UserError for a class list without classes or with an empty name."""
    if not names:
        raise UserError("There are no classes; expected at least one name. Check the split file or class folders.")
    if any(not name.strip() for name in names):
        raise UserError(f"Class {[not name.strip() for name in names].index(True)} has an empty name. Give it one.")
