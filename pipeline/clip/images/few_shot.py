"""Few-shot subsets: the published ones for seeds 1 to 3, and those of any other seed (docs/design.md 5.12).

The published pickles were drawn with Python's random module, seeded just before. The same calls in the same order draw
the same images: one `sample` for each training class in order of first appearance, then the same for validation.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from pipeline.clip.images.classes import LabelledImage, Splits
from pipeline.errors import UserError

VALIDATION_SHOTS = 4
Fewer = Literal["refuse", "all"]


def few_shot(splits: Splits, shots: int, seed: int, fewer: Fewer = "refuse") -> Splits:
    """`shots` training images and at most 4 validation images of each class; the test split is unchanged.

    All classes are sampled; base or new classes are selected afterwards, as published. A class with fewer training
    images than `shots` is a UserError, or contributes all its images where `fewer` is all. Validation takes what a
    class has.
    """
    if shots < 1:
        raise UserError(f"The number of shots is {shots}; expected 1 or more. Correct it, or train on all images.")
    short = [images for images in by_class(splits.train).values() if len(images) < shots]
    if short and fewer == "refuse":
        fewest = min(short, key=len)
        raise UserError(
            f"{len(short)} of the classes have fewer than {shots} training images, '{fewest[0].name}' only "
            f"{len(fewest)}. Take "
            "fewer shots, add images, or let such classes give all they have (fewer: all)."
        )
    generator = random.Random(seed)
    train = _sampled(splits.train, shots, generator)
    return Splits(train, _sampled(splits.val, min(shots, VALIDATION_SHOTS), generator), splits.test)


def by_class(images: Sequence[LabelledImage]) -> dict[int, list[LabelledImage]]:
    """The images by label, labels in order of first appearance."""
    grouped: dict[int, list[LabelledImage]] = {}
    for image in images:
        grouped.setdefault(image.label, []).append(image)
    return grouped


def _sampled(images: Sequence[LabelledImage], shots: int, generator: random.Random) -> tuple[LabelledImage, ...]:
    taken: list[LabelledImage] = []
    for candidates in by_class(images).values():
        # As in the published code a class whose images are all taken draws no random number.
        taken.extend(generator.sample(candidates, shots) if len(candidates) >= shots else candidates)
    return tuple(taken)
