"""A tokenised sample, and the numbers of its tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Example:
    """A tokenised sample: `prompt` (first token, image tokens, question) and `answer` (with the end token).

    Further turns follow in `answer`; `learned` then marks its tokens that are answers.
    """

    id: str
    prompt: list[int]
    answer: list[int]
    images: dict[str, Tensor] | None  # `ImageSizes.inputs`; crops or patches in the first dimension
    learned: list[bool] | None = None
    picture: bytes = b""  # digest of the image file: equal for equal images, empty without one

    @property
    def labels(self) -> list[int]:
        """Labels for `answer`: its tokens, with -100 for those of further questions."""
        if self.learned is None:
            return self.answer
        return [token if learn else -100 for token, learn in zip(self.answer, self.learned, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        pixels = sum(value.nbytes for value in (self.images or {}).values())
        return pixels + 36 * (len(self.prompt) + len(self.answer))  # a Python int in a list: 28 + 8 bytes


@dataclass(frozen=True)
class Length:
    """Numbers of tokens: of the prompt, which includes the image's, of the answer with the end token, of the image."""

    prompt: int
    answer: int
    image: int

    @property
    def all(self) -> int:
        return self.prompt + self.answer


def picture_digest(image: bytes | None) -> bytes:
    """A digest of an image file, b"" without one."""
    return b"" if image is None else hashlib.blake2b(image, digest_size=16).digest()
