"""LLaVA-1.5 and FastVLM: one crop of a fixed size; LLaVA-NeXT (1.6): crops of the grid that fits the image best."""

from __future__ import annotations

from typing import Any

from PIL import Image

from pipeline.backbones.families.base import LMMFamily
from pipeline.data.image_sizes import ImageShape, ImageSizes


class LlavaSizes(ImageSizes):
    """One crop of a fixed size."""

    def of(self, width: int, height: int) -> ImageShape:
        high, wide = self.one_size
        processor, patch = self.processor, self.processor.patch_size
        tokens = (high // patch) * (wide // patch) + processor.num_additional_image_tokens
        tokens -= processor.vision_feature_select_strategy == "default"
        return ImageShape(tokens, 1, self.token, 1, (high // patch) * (wide // patch) + 1, 3 * high * wide)

    def limit(self, most: int) -> int:
        return self.of(1, 1).tokens

    @property
    def one_size(self) -> tuple[int, int]:
        size = self.images.crop_size if getattr(self.images, "do_center_crop", False) else self.images.size
        return int(size["height"]), int(size["width"])


class LlavaNextSizes(ImageSizes):
    """The whole image in one crop, and the crops of the best fitting grid without the features of padding."""

    knob = "image_grid_pinpoints"
    inputs = ("pixel_values", "image_sizes")
    counts_crops = True

    def of(self, width: int, height: int) -> ImageShape:
        # Here: with it come transformers' model classes, for which `import_model_classes` has its time.
        from transformers.image_processing_utils import select_best_resolution

        side = self._side
        processor = self.processor
        tokens = int(processor._get_number_of_features(height, width, side, side))
        tokens -= processor.vision_feature_select_strategy == "default"
        high, wide = select_best_resolution((height, width), self.images.image_grid_pinpoints)
        crops = (high // side) * (wide // side) + 1
        tower = crops * ((side // processor.patch_size) ** 2 + 1)
        return ImageShape(tokens, 1, self.token, crops, tower, crops * 3 * side * side)

    @property
    def _side(self) -> int:
        return int(self.images.crop_size["height"])

    def limit(self, most: int) -> int:
        per_crop = (self._side // self.processor.patch_size) ** 2

        def largest(grid: list[int]) -> int:  # tokens without padding, and the vector that ends each row of patches
            rows = grid[0] // self.processor.patch_size
            return per_crop + rows * (grid[1] // self.processor.patch_size) + rows

        grids = sorted(self.images.image_grid_pinpoints, key=largest)
        self.images.image_grid_pinpoints = [grid for grid in grids if largest(grid) <= most] or grids[:1]
        return largest(grids[0])

    def prepared(self, picture: Image.Image) -> Image.Image:
        return picture  # the centre crop applies to crops, which are square already


class Llava(LMMFamily):
    """LLaVA-1.5."""

    kind = "llava"
    supports_vicuna_template = True
    keeps_features = True
    sizes = LlavaSizes


class FastVLM(LMMFamily):
    """FastVLM: as LLaVA-1.5, with a convolutional vision tower, whose last features all become tokens.

    `python -m data_prep.assemble` makes such models with an EfficientNet, which transformers has itself.
    """

    kind = "fast_vlm"
    tower_attends = False
    compiles_tower = False  # its convolutions differ from block to block
    keeps_features = True
    sizes = LlavaSizes


class LlavaNext(LMMFamily):
    """LLaVA-NeXT (1.6): a learned vector ends each row of features.

    That vector is a parameter of a module whose forward is never called; DeepSpeed gathers it when it is read.
    """

    kind = "llava_next"
    supports_vicuna_template = True
    sizes = LlavaNextSizes

    def adopt(self, processor: Any) -> None:
        # The model arranges the features of an image's crops by these.
        self.model.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints
