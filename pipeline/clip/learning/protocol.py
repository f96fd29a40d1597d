"""Steps and learning rates as the published runs count them (docs/design.md 5.5, 5.14)."""

from __future__ import annotations

import math

WARMUP_RATE = 1e-5


def epoch_rates(rate: float, epochs: int, warmup_epochs: int = 1) -> list[float]:
    """The learning rate of each epoch: 1e-5 in warm-up epochs, then a cosine that counts epochs after the first.

    Rates change once per epoch and the cosine runs over all `epochs`, so it never reaches 0.
    """
    cosine = [rate / 2 * (1 + math.cos(math.pi * epoch / epochs)) for epoch in range(epochs)]
    return [WARMUP_RATE] * min(warmup_epochs, epochs) + cosine[: max(0, epochs - warmup_epochs)]


def steps_per_epoch(images: int, batch: int) -> int:
    """Whole batches in an epoch; all images at once where they are fewer than a batch."""
    return max(1, images // batch)


def small_set_warning(images: int, batch: int, epochs: int) -> str | None:
    """One sentence when a batch is larger than the training set, else None."""
    if batch <= images:
        return None
    return (
        f"The batch of {batch} is larger than the {images} training images: an epoch is one step of {images} images, "
        f"the whole training {epochs} steps. Set a smaller batch, or more epochs."
    )
