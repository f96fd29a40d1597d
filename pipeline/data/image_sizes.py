"""How many tokens and crops a processor makes of an image, by the image's width and height alone: nothing is decoded.

Lengths of samples, the memory plan and the batches of an evaluation follow from the index of the prepared data with
this. A model family says it for its processor, exactly, with the settings that the processor was loaded with; the tests
compare with the processors themselves. `limit_image_tokens` sets a processor's own knob so that an image takes at most
so many tokens (recipe field model.image_tokens).
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


class ImageSizes(ABC):
    """What a family's processor makes of an image of some size, and how that is limited."""

    knob: ClassVar[str] = ""  # the setting of the processor that `limit` changes, for messages
    # The tensors of an image that the processor hands over: pixels, and what the model has to know about them.
    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    # Whether another of these tensors tells the model how many crops or patches an image has.
    counts_crops: ClassVar[bool] = False

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.images = processor.image_processor
        self.token: str = getattr(processor.tokenizer, "image_token", None) or processor.image_token
        self.most: int | None = None  # tokens of an image at most, where `limit` was called
        self.options: dict[str, Any] = {}  # of the processor's call

    @abstractmethod
    def of(self, width: int, height: int) -> ImageShape:
        """What an image of this size becomes; ValueError for a size that the processor refuses."""

    @abstractmethod
    def limit(self, most: int) -> int:
        """Set the processor's knob; return the fewest tokens that an image can take with it, more than `most` if
        that cannot be held."""

    def prepared(self, picture: Image.Image) -> Image.Image:
        """The picture as it is given to the processor: as it is, unless the processor would need it otherwise."""
        return central(picture) if getattr(self.images, "do_center_crop", False) else picture


def know_image_sizes(processor: Any, sizes: type[ImageSizes]) -> None:
    """Let `image_sizes` find what the processor's family says of it."""
    known = sizes(processor)
    # Data sets have far fewer sizes than images.
    known.of = lru_cache(maxsize=1 << 16)(known.of)  # type: ignore[method-assign]
    processor._image_sizes = known


def image_sizes(processor: Any) -> ImageSizes:
    """What a processor that `load_processor` read makes of images, limited as `limit_image_tokens` left it."""
    return processor._image_sizes


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
