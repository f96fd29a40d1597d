"""Shortens a sample that is too long for the model, by a rule that depends only on the sample and the limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from pipeline.data.sample import Sample


def cut_to_fit(sample: Sample, length: Callable[[Sample], int], most: int) -> Sample | None:
    """Shorten a sample's text as little as needed for a `length` of `most` tokens; None where that does not suffice.

    Whole further turns are dropped first, starting with the last one; then the start of the first question is cut,
    because its end says what is asked and how to answer. The image's tokens and the answer are never cut.
    """
    turns = list(sample.meta.get("turns") or [])
    while turns and length(sample) > most:
        turns.pop()
        rest = {name: value for name, value in sample.meta.items() if name != "turns"}
        sample = dataclasses.replace(sample, meta={**rest, "turns": turns} if turns else rest)
    if length(sample) <= most:
        return sample

    def without(characters: int) -> Sample:
        return dataclasses.replace(sample, question=sample.question[characters:].lstrip())

    if length(without(len(sample.question))) > most:
        return None
    low, high = 0, len(sample.question)  # `high` fits, `low` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if length(without(middle)) <= most else (middle, high)
    return without(high)
