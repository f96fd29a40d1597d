"""Idefics3 and SmolVLM: a grid of square crops, then the whole image in one crop."""

from __future__ import annotations

import math

from torch import Tensor

from pipeline.backbones.families.base import LMMFamily
from pipeline.data.image_sizes import ImageShape, ImageSizes

IDEFICS_LONGEST = 4096  # transformers' own bound on Idefics' resized side, MAX_IMAGE_SIZE


class Idefics3Sizes(ImageSizes):
    """A grid of square crops, then the whole image in one crop."""

    knob = "size.longest_edge"
    inputs = ("pixel_values", "pixel_attention_mask")

    def of(self, width: int, height: int) -> ImageShape:
        rows, columns = self._grid(width, height)
        processor, side = self.processor, int(self.images.max_image_size["longest_edge"])
        fake, whole = processor.fake_image_token, f"{processor.global_image_tag}{self.token}"
        text = "".join(
            "".join(f"{fake}<row_{row + 1}_col_{column + 1}>{self.token}" for column in range(columns)) + "\n"
            for row in range(rows)
        )
        text += f"{chr(10) * bool(rows)}{fake}{whole}{fake}"
        crops, length = rows * columns + 1, processor.image_seq_len
        # Pixels and their mask.
        return ImageShape(crops * length, crops, text, crops, crops * self._tower, crops * 4 * side * side)

    @property
    def _tower(self) -> int:
        return 4 * int(self.processor.image_seq_len)  # at least: scale_factor is 2 or more, see `model_shape`

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the grid; (0, 0) where the image is not split."""
        if not self.images.do_image_splitting:
            return 0, 0
        side = int(self.images.max_image_size["longest_edge"])
        if self.images.do_resize:
            width, height = self._resized(width, height)
        ratio = width / height
        if width >= height:
            width = math.ceil(width / side) * side
            height = math.ceil(int(width / ratio) / side) * side
        else:
            height = math.ceil(height / side) * side
            width = math.ceil(int(height * ratio) / side) * side
        return (height // side, width // side) if max(width, height) > side else (0, 0)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        longest, ratio = int(self.images.size["longest_edge"]), width / height
        if width >= height:
            width, height = longest, int(longest / ratio)
            height += height % 2
        else:
            width, height = int(longest * ratio), longest
            width += width % 2
        width, height = max(width, 1), max(height, 1)
        ratio = width / height
        if max(width, height) > IDEFICS_LONGEST:
            if width >= height:
                width, height = IDEFICS_LONGEST, int(IDEFICS_LONGEST / ratio)
            else:
                width, height = int(IDEFICS_LONGEST * ratio), IDEFICS_LONGEST
        return max(width, 1), max(height, 1)

    def limit(self, most: int) -> int:
        crops = most // self.processor.image_seq_len
        side = int(self.images.max_image_size["longest_edge"])
        along = max(1, math.isqrt(max(0, crops - 1)))  # crops along either side of a square image
        self.images.size = {"longest_edge": min(along, IDEFICS_LONGEST // side) * side}
        return int(self.processor.image_seq_len)


class Idefics3(LMMFamily):
    """Idefics3; its model expects crops as [samples, crops, ...], padded per sample: here all crops are one sample."""

    kind = "idefics3"
    decoder = "text_model"
    projector = "connector"
    sizes = Idefics3Sizes
    image_prefix_tokens = 2  # <fake_token_around_image> and a row and column, or <global-img>
    image_suffix_tokens = 1  # <fake_token_around_image>

    def image_features(self, images: dict[str, Tensor]) -> Tensor:
        return super().image_features({name: value[None] for name, value in images.items()})


class SmolVLM(Idefics3):
    """SmolVLM: Idefics3 with videos; its processor class differs from Idefics3's in videos only."""

    kind = "smolvlm"
    processor = "Idefics3Processor"
