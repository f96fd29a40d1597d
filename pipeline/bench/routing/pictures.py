"""Pictures of the probe: the embedded tasks' scenes, told apart by their attributes, and the CLIP keys of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from data_prep.nano.scenes import DIGIT_PARTS, DRAW, FAMILIES, Scene, draw_digit

if TYPE_CHECKING:
    from pipeline.backbones.clip import KeyEncoder

STREAM = 14  # part of every random generator's seed
SPLITS = ("train", "test")
BATCH = 256  # pictures per forward pass
WARM, COLD = ("red", "yellow", "orange"), ("green", "blue", "cyan")  # purple is in neither
GREY = 30  # the largest difference of a grey pixel's channels, noise included
DARK = 128  # backgrounds are below 60 or above 205

Attributes = Mapping[str, object]


@dataclass(frozen=True)
class Cut:
    """A population of pictures: those of a family whose attributes have one of the given values."""

    family: str
    where: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    def holds(self, attributes: Attributes) -> bool:
        """Whether a picture of the family with these attributes belongs to the population."""
        return all(attributes[name] in values for name, values in self.where.items())


@dataclass
class Pool:
    """The pictures of one family in one split, with their attributes; tasks that ask about a family share them."""

    scenes: list[Scene]

    def __post_init__(self) -> None:
        self.attributes = [attributes_of(scene) for scene in self.scenes]
        self.pixels = np.stack([scene.image for scene in self.scenes])

    def rows(self, cut: Cut) -> npt.NDArray[np.int64]:
        """The numbers of the pictures of a population."""
        return np.flatnonzero([cut.holds(found) for found in self.attributes])

    def encode(self, encoder: KeyEncoder) -> None:
        """Compute the image keys [N, K] float16 of all pictures, as `prepare` does."""
        parts = [
            encoder.image(encoder.pixels([Image.fromarray(pixels) for pixels in self.pixels[first : first + BATCH]]))
            for first in range(0, len(self.pixels), BATCH)
        ]
        self.keys: Tensor = torch.cat(parts).half()


def draw_pool(family: str, split: str, count: int, seed: int) -> Pool:
    """`count` pictures of a family, a function of the arguments alone; no scan of a digit is in both splits."""
    rng = np.random.default_rng([seed, FAMILIES.index(family), SPLITS.index(split), STREAM])
    part = DIGIT_PARTS[split]
    scans = part.stop - part.start
    return Pool(
        [draw_digit(rng, split, number % scans) if family == "digit" else DRAW[family](rng) for number in range(count)]
    )


def attributes_of(scene: Scene) -> dict[str, object]:
    """What a cut may ask of a scene, by the names of the family's attributes."""
    found: dict[str, object] = {"background": "dark" if _background(scene.image) < DARK else "light"}
    if scene.family == "digit":
        return found | {"digit": scene.digit, "ink": scene.colour}
    if scene.family == "text":
        return found | {"letters": len(scene.letters or ""), "ink": scene.colour}
    if scene.family == "chart":
        ranked = sorted(scene.things, key=lambda bar: bar.box[1])
        return found | {"bars": len(ranked), "tallest": ranked[0].colour, "shortest": ranked[-1].colour}
    alone = scene.things[0].colour if len(scene.things) == 1 else None  # no cut asks for None
    return found | {"things": len(scene.things), "ink": alone}


def _background(image: npt.NDArray[np.uint8]) -> float:
    """The level of the background, which is the most frequent grey: everything else but a chart's line has a colour."""
    spread = image.max(axis=2).astype(int) - image.min(axis=2)
    return float(np.median(image[spread < GREY]))
