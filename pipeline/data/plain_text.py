"""Tokenises users' text without special tokens, in training and in answering.

Tokenizers convert `<image>`, `</s>` or `<|im_end|>` in a question or an answer to special tokens. In a question about
HTML that would add an image, and in a request to a server it would let the caller open another role.
"""

from __future__ import annotations

import copy
import re
from functools import cached_property
from typing import Any


class PlainText:
    """Tokenises text without special tokens.

    The conversation uses it only where `holds_special`, because tokens at the border of two separately tokenised parts
    may differ from those of the whole text.
    """

    def __init__(self, tokenizer: Any, also: tuple[str, ...] = ()) -> None:
        """`also` are further strings that a processor replaces, such as its placeholder for an image."""
        self._tokenizer = tokenizer
        marks = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {*also}
        self._marks = re.compile("|".join(map(re.escape, sorted(marks - {""}, key=len, reverse=True))) or r"(?!)")

    def holds_special(self, text: str) -> bool:
        """Whether the tokenizer or processor would convert a part of the text to a special token."""
        return self._marks.search(text) is not None

    def __call__(self, text: str) -> list[int]:
        """Tokens of the text, none of them special."""
        return list(self._splitting(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    @cached_property
    def _splitting(self) -> Any:
        # A copy, because a fast tokenizer keeps this setting for later calls and threads share the original.
        return copy.deepcopy(self._tokenizer)
