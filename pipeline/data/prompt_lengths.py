"""How long prompts are, as far as that is known without reading a sample: to generate similar ones together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.data.collate import Examples
from pipeline.errors import UserError

CHARS_PER_TOKEN = 4  # of English text, roughly: the estimate only decides which samples stand together


def prompt_lengths(examples: Examples, indices: Sequence[int]) -> npt.NDArray[np.int64]:
    """About how many tokens the prompts of these samples have [n], from the index of the prepared data alone.

    Exact where the samples are tokenised already.
    """
    if examples.ready is not None:
        return np.array([len(examples.ready[index].prompt) for index in indices], dtype=np.int64)
    chosen = np.asarray(indices, dtype=np.int64)
    text = examples.data.question_chars()[chosen].astype(np.int64) // CHARS_PER_TOKEN
    sizes, number = np.unique(examples.data.sizes()[chosen], axis=0, return_inverse=True)
    tokens = np.array([_image_tokens(examples, width, height) for width, height in sizes.tolist()], dtype=np.int64)
    return text + tokens[number.reshape(-1)] if len(tokens) else text


def _image_tokens(examples: Examples, width: int, height: int) -> int:
    if not width or not height:
        return 0
    try:
        return examples.conversation.image_shape(width, height).tokens
    except UserError:  # the processor refuses this form of image, and says so when the sample's turn comes
        return 0
