"""InternVL in transformers' format ("-hf"): square crops in a grid of about the image's aspect ratio."""

from __future__ import annotations

from pipeline.backbones.families.base import LMMFamily
from pipeline.data.image_sizes import ImageShape, ImageSizes


class InternVLSizes(ImageSizes):
    """Square crops in a grid of about the image's aspect ratio; several are followed by the whole image in one crop."""

    knob = "max_patches"

    def of(self, width: int, height: int) -> ImageShape:
        crops = int(self.images.get_number_of_image_patches(height, width, {"crop_to_patches": True}))
        length, size = self.processor.image_seq_length, self.images.size
        text = f"{self.processor.start_image_token}{self.token}{self.processor.end_image_token}"
        values = 3 * int(size["height"]) * int(size["width"])
        # The vision tower processes four patches per token, and a class token.
        return ImageShape(crops * length, 1, text, crops, crops * (4 * length + 1), crops * values)

    def limit(self, most: int) -> int:
        crops = most // self.processor.image_seq_length
        tiles = max(1, crops - 1)
        self.images.max_patches = tiles
        self.images.min_patches = min(int(self.images.min_patches), tiles)
        return int(self.processor.image_seq_length)


class InternVL(LMMFamily):
    """InternVL."""

    kind = "internvl"
    processor = "InternVLProcessor"
    sizes = InternVLSizes
    image_prefix_tokens = 1  # <img>
    image_suffix_tokens = 1  # </img>
