"""Qwen2.5-VL: images of any size; positions are (time, row, column), see M-RoPE in arXiv 2409.12191."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from pipeline.backbones.families.base import LMMFamily
from pipeline.data.image_sizes import ImageShape, ImageSizes


class Qwen25VLSizes(ImageSizes):
    """Patches of the whole image, merged 2 x 2; the processor refuses aspect ratios above 200."""

    knob = "max_pixels"
    inputs = ("pixel_values", "image_grid_thw")
    counts_crops = True

    def of(self, width: int, height: int) -> ImageShape:
        patches = self._patches(width, height)
        tokens = self._tokens(patches)
        if self.most is not None and tokens > self.most:  # an elongated image, which `prepared` shrinks
            tokens = self.most
            patches = tokens * self.images.merge_size**2
        values = patches * 3 * self.images.temporal_patch_size * self.images.patch_size**2
        return ImageShape(tokens, 1, self.token, 1, patches, values)

    def _patches(self, width: int, height: int) -> int:
        return int(self.images.get_number_of_image_patches(height, width, {}))

    def _tokens(self, patches: int) -> int:
        return patches // self.images.merge_size**2

    @property
    def _unit(self) -> int:
        return int(self.images.patch_size * self.images.merge_size)  # pixels per side of a token

    def limit(self, most: int) -> int:
        pixels = most * self._unit**2
        least = min(int(self.images.size["shortest_edge"]), pixels)
        self.images.size = {"shortest_edge": least, "longest_edge": pixels}
        self.most = most
        return 1

    def prepared(self, picture: Image.Image) -> Image.Image:
        # max_pixels bounds the area only: an elongated image keeps one row of tokens of any length.
        width, height = picture.size
        if self.most is None or self._tokens(self._patches(width, height)) <= self.most:
            return picture
        sides = (self.most * self._unit, self._unit)
        return picture.resize(sides if width > height else sides[::-1], Image.Resampling.BICUBIC)


class Qwen25VL(LMMFamily):
    """Qwen2.5-VL."""

    kind = "qwen2_5_vl"
    processor = "Qwen2_5_VLProcessor"
    projector = "visual.merger"
    sizes = Qwen25VLSizes
    image_prefix_tokens = 1  # <|vision_start|>
    image_suffix_tokens = 1  # <|vision_end|>
    needs_image_mask = True
    compiles_tower = False  # its attention is split by the sizes of the images
    lean_attentions = ("Qwen2_5_VLAttention",)

    def decoder_inputs(
        self, embeddings: Tensor, attention: Tensor, image_mask: Tensor | None, images: dict[str, Tensor] | None
    ) -> dict[str, Any]:
        assert image_mask is not None and images is not None
        # Prompt vectors are treated as words. Of the first argument only shape and type are used.
        positions, _ = self.model.model.get_rope_index(
            attention,
            mm_token_type_ids=image_mask.long(),
            attention_mask=attention,
            image_grid_thw=images["image_grid_thw"],
        )
        return {"attention_mask": attention, "position_ids": positions}  # positions [3, B, N]

    def next_position(self, attention: Tensor, inputs: dict[str, Any]) -> Tensor:
        # An image advances positions by the longer of its sides, not by its number of tokens.
        return inputs["position_ids"].masked_fill(~attention.bool(), 0).amax((0, 2)) + 1

    def position_ids(self, positions: Tensor) -> Tensor:
        return positions.expand(3, -1, -1)
