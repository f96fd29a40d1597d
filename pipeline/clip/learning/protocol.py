"""Steps and learning rates as in the published runs (docs/design.md 5.5, 5.14)."""

from __future__ import annotations

import math

WARMUP_RATE = 1e-5  # constant rate of the warm-up epochs


def epoch_rates(rate: float, epochs: int, warmup_epochs: int = 1) -> list[float]:
    """The learning rate of each epoch: WARMUP_RATE in warm-up epochs, then a cosine from `rate`.

    The rate is constant within an epoch. The cosine has the period of all `epochs`, warm-up included, and starts after
    the warm-up, so it never reaches 0.
    """
    cosine = [rate / 2 * (1 + math.cos(math.pi * epoch / epochs)) for epoch in range(epochs)]
    return [WARMUP_RATE] * min(warmup_epochs, epochs) + cosine[: max(0, epochs - warmup_epochs)]


def steps_per_epoch(images: int, batch: int) -> int:
    """The number of whole batches in an epoch; 1 where there are fewer images than a batch has."""
    return max(1, images // batch)


def small_set_warning(images: int, batch: int, epochs: int) -> str | None:
    """A warning when the batch is larger than the training set, else None."""
    if batch <= images:
        return None
    return (
        f"The batch of {batch} is larger than the {images} training images: an epoch is one step of {images} images, "
        f"the whole training {epochs} steps. Set a smaller batch, or more epochs."
    )
