"""The numbers of tokens and crops that a processor makes of an image, computed from its width and height.

Lengths of samples, the memory plan and the batches of an evaluation are computed with this from the index of the
prepared data, without decoding images. Each model family implements it for its processor, exactly and for the settings
with which the processor was loaded; tests compare it with the processors. `limit_image_tokens` sets the processor's own
setting that bounds the tokens of an image (recipe field model.image_tokens).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from PIL import Image

from pipeline.data.pictures import central
from pipeline.errors import UserError


@dataclass(frozen=True)
class ImageShape:
    """What the processor makes of one image.

    The prompt has `tokens` image tokens in `runs` contiguous runs; `text` is what the processor inserts for the image,
    with each run shortened to one image token.
    """

    tokens: int
    runs: int
    text: str
    crops: int  # images that the vision tower encodes
    tower_tokens: int  # tokens in the vision tower's layers, over all crops
    values: int  # numbers in the processor's tensors


class ImageSizes(ABC):
    """Tokens and crops that a family's processor makes of an image of some size, and their limit."""

    knob: ClassVar[str] = ""  # the setting of the processor that `limit` changes, for messages
    # The tensors of an image that the processor returns and the model takes.
    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    # Whether one of these tensors tells the model how many crops or patches an image has.
    counts_crops: ClassVar[bool] = False

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.images = processor.image_processor
        self.token: str = getattr(processor.tokenizer, "image_token", None) or processor.image_token
        self.most: int | None = None  # most tokens of an image, where `limit` was called
        self.options: dict[str, Any] = {}  # keyword arguments for calls of the processor

    @property
    def one_size(self) -> tuple[int, int] | None:
        """Height and width in pixels to which every image is brought; None where they depend on the image."""
        return None

    @abstractmethod
    def of(self, width: int, height: int) -> ImageShape:
        """The ImageShape for an image of this size; ValueError for a size that the processor refuses."""

    @abstractmethod
    def limit(self, most: int) -> int:
        """Change the processor's setting so that an image takes at most `most` tokens.

        Returns the fewest tokens to which images can be limited; above `most` where that limit is impossible.
        """

    def prepared(self, picture: Image.Image) -> Image.Image:
        """The picture for the processor: cut to its centre (see `central`) where the processor crops the centre."""
        return central(picture) if getattr(self.images, "do_center_crop", False) else picture


def know_image_sizes(processor: Any, sizes: type[ImageSizes]) -> None:
    """Attach the family's ImageSizes to a processor, for `image_sizes`."""
    known = sizes(processor)
    # Cached, because datasets have far fewer sizes than images.
    known.of = lru_cache(maxsize=1 << 16)(known.of)  # type: ignore[method-assign]
    processor._image_sizes = known


def image_sizes(processor: Any) -> ImageSizes:
    """The ImageSizes of a processor from `load_processor`, with the limit that `limit_image_tokens` set."""
    return processor._image_sizes


def limit_image_tokens(processor: Any, most: int | None) -> None:
    """Limit the tokens of an image to `most`; None keeps the checkpoint's own setting.

    Raises UserError where the family's fixed or smallest number is larger.
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
