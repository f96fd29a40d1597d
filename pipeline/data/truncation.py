"""Cutting a sample that is too long for the model: which text is left out, by a rule that depends on nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from pipeline.data.sample import Sample


def cut_to_fit(sample: Sample, length: Callable[[Sample], int], most: int) -> Sample | None:
    """The sample with as little text left out as its `length` in tokens needs to be `most`, None where none suffices.

    Further turns are left out from the last on, whole; then the beginning of the (first) question, since the end says
    what is asked and how to answer. The image's tokens and the answer are never cut.
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
