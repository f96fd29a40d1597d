"""How many tokens and crops a model makes of an image, by the image's width and height alone: nothing is decoded.

Lengths of samples, the memory plan and the batches of an evaluation follow from the index of the prepared data with
this. Exact for the processors of the supported families with the settings that they were loaded with; the tests compare
with the processors themselves. `limit_image_tokens` sets a processor's own knob so that an image takes at most so many
tokens (recipe field model.image_tokens).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from PIL import Image

from pipeline.data.pictures import central
from pipeline.errors import UserError

GRID_LIMIT = 64  # most rows or columns of crops that are looked through for a limit
IDEFICS_LONGEST = 4096  # transformers' own bound on Idefics' resized side, MAX_IMAGE_SIZE


@dataclass(frozen=True)
class ImageShape:
    """What one image becomes.

    In the prompt stand `tokens` image tokens in `runs` unbroken rows; `text` is what the processor puts into the text,
    with one image token for each run.
    """

    tokens: int
    runs: int
    text: str
    crops: int  # images that the vision tower sees
    tower_tokens: int  # what the vision tower's layers work on, of all crops
    values: int  # numbers that the processor hands over


class ImageSizes:
    """One crop of a fixed size, as in LLaVA-1.5; the others differ in what they override.

    `of` raises ValueError for sizes that the processor refuses.
    """

    knob: ClassVar[str] = ""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.images = processor.image_processor
        self.token: str = getattr(processor.tokenizer, "image_token", None) or processor.image_token
        self.most: int | None = None
        self.options: dict[str, Any] = {}  # of the processor's call

    def of(self, width: int, height: int) -> ImageShape:
        """What an image of this size becomes."""
        high, wide = self._crop()
        processor, patch = self.processor, self.processor.patch_size
        tokens = (high // patch) * (wide // patch) + processor.num_additional_image_tokens
        tokens -= processor.vision_feature_select_strategy == "default"
        return ImageShape(tokens, 1, self.token, 1, (high // patch) * (wide // patch) + 1, 3 * high * wide)

    def limit(self, most: int) -> int:
        """Set the processor's knob; return the fewest tokens that an image can take with it, more than `most` if
        that cannot be held."""
        return self.of(1, 1).tokens

    def prepared(self, picture: Image.Image) -> Image.Image:
        """The picture as it is given to the processor: as it is, unless the processor would need it otherwise."""
        return central(picture) if getattr(self.images, "do_center_crop", False) else picture

    def _crop(self) -> tuple[int, int]:
        size = self.images.crop_size if getattr(self.images, "do_center_crop", False) else self.images.size
        return int(size["height"]), int(size["width"])


class Qwen25VLSizes(ImageSizes):
    """Patches of the whole image, merged 2 x 2; it refuses sides that differ more than 200 times."""

    knob = "max_pixels"

    def of(self, width: int, height: int) -> ImageShape:
        patches = self._patches(width, height)
        tokens = self._tokens(patches)
        if self.most is not None and tokens > self.most:  # a strip, of which one row of tokens is more; see `prepared`
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
        return int(self.images.patch_size * self.images.merge_size)  # pixels along a token's side

    def limit(self, most: int) -> int:
        pixels = most * self._unit**2
        least = min(int(self.images.size["shortest_edge"]), pixels)
        self.images.size = {"shortest_edge": least, "longest_edge": pixels}
        self.most = most
        return 1

    def prepared(self, picture: Image.Image) -> Image.Image:
        # The knob bounds the area only: a strip keeps one row of tokens however long that is.
        width, height = picture.size
        if self.most is None or self._tokens(self._patches(width, height)) <= self.most:
            return picture
        sides = (self.most * self._unit, self._unit)
        return picture.resize(sides if width > height else sides[::-1], Image.Resampling.BICUBIC)


class InternVLSizes(ImageSizes):
    """Square crops in a grid of about the image's form, and behind several a small view of the whole."""

    knob = "max_patches"

    def of(self, width: int, height: int) -> ImageShape:
        crops = int(self.images.get_number_of_image_patches(height, width, {"crop_to_patches": True}))
        length, size = self.processor.image_seq_length, self.images.size
        text = f"{self.processor.start_image_token}{self.token}{self.processor.end_image_token}"
        values = 3 * int(size["height"]) * int(size["width"])
        # The tower's patches are shuffled into tokens four to one, plus its class token.
        return ImageShape(crops * length, 1, text, crops, crops * (4 * length + 1), crops * values)

    def limit(self, most: int) -> int:
        crops = most // self.processor.image_seq_length
        tiles = max(1, crops - 1)
        self.images.max_patches = tiles
        self.images.min_patches = min(int(self.images.min_patches), tiles)
        return int(self.processor.image_seq_length)


class Idefics3Sizes(ImageSizes):
    """Rows and columns of crops, then a small view of the whole; SmolVLM does the same."""

    knob = "size.longest_edge"

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
        """Rows and columns of crops, 0 and 0 where the image is one."""
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


class Gemma3Sizes(ImageSizes):
    """The whole image and, with pan-and-scan, crops along the longer side of an elongated one."""

    knob = "pan_and_scan_max_num_crops"

    def of(self, width: int, height: int) -> ImageShape:
        crops = self._crops(width, height)
        processor, size = self.processor, self.images.size
        length = int(processor.image_seq_length)
        one = processor.full_image_sequence.replace(self.token * length, self.token)
        text = one
        if crops:
            text = f"Here is the original image {one} and here are some crops to help you see better "
            text += " ".join([one] * crops)
        count, values = crops + 1, 3 * int(size["height"]) * int(size["width"])
        # SigLIP's patches are averaged 4 x 4 into tokens.
        return ImageShape(count * length, count, text, count, count * 16 * length, count * values)

    def _crops(self, width: int, height: int) -> int:
        scan = self.options.get("images_kwargs", {})
        if not scan.get("do_pan_and_scan"):
            return 0
        longer, shorter = max(width, height), min(width, height)
        least, most = scan["pan_and_scan_min_crop_size"], scan["pan_and_scan_max_num_crops"]
        if longer / shorter < scan["pan_and_scan_min_ratio_to_activate"]:
            return 0
        crops = min(math.floor(longer / least), math.floor(longer / shorter + 0.5))
        crops = min(most, max(2, crops))
        return 0 if min(math.ceil(longer / crops), shorter) < least else crops

    def limit(self, most: int) -> int:
        crops = most // int(self.processor.image_seq_length)
        if crops > 2:  # the processor cuts into two or more, beside the whole
            self.options = {
                "images_kwargs": {
                    "do_pan_and_scan": True,
                    "pan_and_scan_max_num_crops": crops - 1,
                    "pan_and_scan_min_crop_size": 256,
                    "pan_and_scan_min_ratio_to_activate": 1.2,
                }
            }
        return int(self.processor.image_seq_length)


class LlavaNextSizes(ImageSizes):
    """A view of the whole and crops of the grid that fits best, without what was only padding."""

    knob = "image_grid_pinpoints"

    def of(self, width: int, height: int) -> ImageShape:
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

        def largest(grid: list[int]) -> int:  # nothing of it padding, and a vector behind each row of patches
            rows = grid[0] // self.processor.patch_size
            return per_crop + rows * (grid[1] // self.processor.patch_size) + rows

        grids = sorted(self.images.image_grid_pinpoints, key=largest)
        self.images.image_grid_pinpoints = [grid for grid in grids if largest(grid) <= most] or grids[:1]
        return largest(grids[0])

    def prepared(self, picture: Image.Image) -> Image.Image:
        return picture  # its centre crop is of crops that are squares already


SIZES: dict[str, type[ImageSizes]] = {
    "LlavaProcessor": ImageSizes,
    "LlavaNextProcessor": LlavaNextSizes,
    "Qwen2_5_VLProcessor": Qwen25VLSizes,
    "InternVLProcessor": InternVLSizes,
    "Idefics3Processor": Idefics3Sizes,
    "SmolVLMProcessor": Idefics3Sizes,
    "Gemma3Processor": Gemma3Sizes,
}


def image_sizes(processor: Any) -> ImageSizes:
    """The sizes of a processor of a supported family, limited as `limit_image_tokens` left them."""
    found = getattr(processor, "_image_sizes", None)
    if found is None:
        found = _bounded(SIZES[type(processor).__name__](processor))
        processor._image_sizes = found
    return found


def limit_image_tokens(processor: Any, most: int | None) -> None:
    """Let an image take at most so many tokens, None: as many as the checkpoint says.

    Raises UserError where the family has a fixed number, or a least one, that is more.
    """
    if most is None:
        return
    sizes = image_sizes(processor)
    least = sizes.limit(most)
    sizes.of.cache_clear()  # type: ignore[attr-defined]
    if least > most:
        knob = f" at the least (its knob is {sizes.knob})" if sizes.knob else ", a fixed number"
        raise UserError(
            f"model.image_tokens is {most}, but an image takes {least} tokens of this model{knob}. Set "
            f"model.image_tokens to {least} or more, or to null for the checkpoint's own setting."
        )


def _bounded(sizes: ImageSizes) -> ImageSizes:
    # Data sets have far fewer sizes than images.
    sizes.of = lru_cache(maxsize=1 << 16)(sizes.of)  # type: ignore[method-assign]
    return sizes
