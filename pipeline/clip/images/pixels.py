"""Image preprocessing: as in evaluation, or augmented as a function of (seed, epoch, image), whichever rank asks."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.pictures import central
from pipeline.errors import UserError

SCALE = (0.08, 1.0)  # share of the picture's area that a crop covers (docs/design.md 5.5)
RATIO = (3 / 4, 4 / 3)  # of a crop's width to its height
TRIES = 10  # draws of a crop that fits, before the centre is taken; SCALE, RATIO and this are torchvision's defaults


class Pixels:
    """A checkpoint's image preprocessing, and the published augmentation before its normalisation.

    Raises UserError when the checkpoint has no image processor.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor

        try:
            # Always the PIL backend: where torchvision is installed transformers would use it, which resizes
            # differently.
            self.processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} has no usable image processor: {error}") from error
        size = getattr(self.processor, "crop_size", None) or self.processor.size
        self.height, self.width = int(size["height"]), int(size["width"])
        self._table = self._normalisation()

    def plain(self, picture: Image.Image) -> Tensor:
        """Pixels [3, H, W] as in evaluation: resized, the centre cropped, normalised."""
        return torch.as_tensor(self.processor(images=[central(picture)], return_tensors="pt")["pixel_values"][0])

    def cropped(self, picture: Image.Image) -> np.ndarray:
        """Pixels [3, H, W] before normalisation, as 8-bit values where the processor's normalisation is a table."""
        if self._table is None:
            return self.plain(picture).numpy()
        return self._bytes(central(picture))

    def normalised(self, cropped: Tensor) -> Tensor:
        """Normalise `cropped` pixels [B, 3, H, W] on their device; the result is bit-identical to `plain`."""
        if self._table is None:
            return cropped
        if self._table.device != cropped.device:
            self._table = self._table.to(cropped.device)
        channels = [self._table[channel][cropped[:, channel].long()] for channel in range(3)]
        return torch.stack(channels, dim=1)

    def _bytes(self, picture: Image.Image) -> np.ndarray:
        options = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
        return np.ascontiguousarray(self.processor(images=[picture], **options)["pixel_values"][0])

    def _normalisation(self) -> Tensor | None:
        """The table [3, 256] from 8-bit to normalised values; None for a processor that changes pixels otherwise too.

        The processor is probed with a ramp of all values, and the table is checked against it on noise.
        """
        ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
        options = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
        noise = np.random.default_rng(0).integers(0, 256, (self.height + 5, self.width + 9, 3)).astype(np.uint8)
        probe = Image.fromarray(noise)
        try:
            table = torch.as_tensor(self.processor(images=[ramp], **options)["pixel_values"][0])[:, 0]
            found = self._bytes(probe)
        except (ValueError, TypeError, KeyError):
            return None
        if table.shape != (3, 256) or found.dtype != np.uint8 or found.shape[0] != 3:
            return None
        looked_up = torch.stack([table[channel][torch.from_numpy(found[channel]).long()] for channel in range(3)])
        return table.contiguous() if torch.equal(looked_up, self.plain(probe)) else None

    def augmented(self, picture: Image.Image, seed: int, epoch: int, image: str) -> Tensor:
        """Pixels [3, H, W] of a random crop, resized with bicubic interpolation and flipped with probability 1/2.

        Args:
            picture: the decoded image.
            seed: the unit's seed.
            epoch: the epoch, counted from 0.
            image: the image's id. Its row in the shards would not do, which depends on the other seeds prepared.
        """
        draws = uniform(seed, epoch, number_of(image), 4 * TRIES + 1)
        box = crop_box(picture.width, picture.height, draws[:-1])
        part = picture.resize((self.width, self.height), Image.Resampling.BICUBIC, box=box)
        if draws[-1] < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        options = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
        return torch.as_tensor(self.processor(images=[part], **options)["pixel_values"][0])


def crop_box(width: int, height: int, draws: list[float]) -> tuple[int, int, int, int]:
    """A random crop (left, top, right, bottom) with an area in SCALE and an aspect ratio in RATIO.

    `draws` are uniform in [0, 1), four for each try: area, ratio, left, top. Where no try fits into the image it is the
    largest central crop within RATIO.
    """
    for area, ratio, left, top in zip(*(draws[k::4] for k in range(4)), strict=True):
        target = width * height * (SCALE[0] + area * (SCALE[1] - SCALE[0]))
        shape = math.exp(math.log(RATIO[0]) + ratio * (math.log(RATIO[1]) - math.log(RATIO[0])))
        w, h = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def number_of(image: str) -> int:
    """A number below 2^64 from an image's id: the first eight bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(image.encode()).digest()[:8], "big")


def uniform(seed: int, epoch: int, image: int, count: int) -> list[float]:
    """`count` uniform numbers in [0, 1), a function of (seed, epoch, image).

    Made from Philox's raw output, because numpy's distributions may change between versions and its bit generators not.
    """
    key = np.array([seed % 2**64, 1], dtype=np.uint64)
    counter = np.array([0, image % 2**64, epoch % 2**64, 0], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(count)
    return ((words >> np.uint64(11)) * 2.0**-53).tolist()
