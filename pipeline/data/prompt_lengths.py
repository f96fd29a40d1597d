"""Estimates the lengths of prompts without reading samples, so that prompts of similar length are batched together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.data.collate import Examples
from pipeline.errors import UserError

CHARS_PER_TOKEN = 4  # roughly, for English text; the estimate only determines batches


def prompt_lengths(examples: Examples, indices: Sequence[int]) -> npt.NDArray[np.int64]:
    """Estimated numbers of tokens [n] of these samples' prompts, from the index of the prepared data.

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
    except UserError:  # the processor refuses this size; tokenising the sample reports it
        return 0
