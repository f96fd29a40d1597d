"""Text of users as tokens: what looks like a special token in it is text, in training and in answering alike.

Tokenizers read `<image>`, `</s>` or `<|im_end|>` in a question or an answer as their own marks. In a question about
HTML that is one image too many, and in what a stranger sends to a server it is another role in the conversation.
"""

from __future__ import annotations

import copy
import re
from functools import cached_property
from typing import Any


class PlainText:
    """Tokenises text without special tokens; the conversation does so only where `holds_special`, since the tokens
    where two parts meet may be others than those of the whole text."""

    def __init__(self, tokenizer: Any, also: tuple[str, ...] = ()) -> None:
        """`also` are further strings that a processor replaces, such as its placeholder for an image."""
        self._tokenizer = tokenizer
        marks = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {*also}
        self._marks = re.compile("|".join(map(re.escape, sorted(marks - {""}, key=len, reverse=True))) or r"(?!)")

    def holds_special(self, text: str) -> bool:
        """Whether the tokenizer or processor would take part of the text for a mark of its own."""
        return self._marks.search(text) is not None

    def __call__(self, text: str) -> list[int]:
        """Tokens of the text, none of them special."""
        return list(self._splitting(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    @cached_property
    def _splitting(self) -> Any:
        # A copy: a fast tokenizer keeps this setting for later calls, and several threads share the original.
        return copy.deepcopy(self._tokenizer)
