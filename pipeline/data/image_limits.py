"""Limits on images from untrusted callers, checked by their headers before pixels are decoded."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from pipeline.data.smaller_pictures import FORMATS, Decoding, plan_decoding
from pipeline.errors import UserError

MIB = 1 << 20
WORK_SIDE = 2048
WORK_PIXELS = WORK_SIDE**2  # larger images are reduced before the model's processor, which copies them several times
DECODE_BYTES = 10  # bytes per pixel of the largest accepted image: 160 MiB for 4096 x 4096


@dataclass(frozen=True)
class ImageLimits:
    """The largest accepted image; `side` limits the sides for models whose images are padded to squares."""

    pixels: int = 4096 * 4096
    side: int | None = None

    @property
    def decode_bytes(self) -> int:
        """Bytes that may be used to decode an image, or several images at the same time."""
        return max(DECODE_BYTES * self.pixels, 128 * MIB)


class ImageRefusedError(UserError):
    """The data is no image, or an image that is `too_large`."""

    def __init__(self, message: str, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


def plan_image(encoded: bytes, limits: ImageLimits) -> Decoding:
    """Plan the decoding of an image from its header; ImageRefusedError where it is no image or too large."""
    try:
        plan = plan_decoding(encoded, WORK_PIXELS, limits.side)
    except Image.DecompressionBombError:
        raise ImageRefusedError(f"the image is huge; expected at most {limits.pixels} pixels.", True) from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ImageRefusedError(
            f"the image is not readable ({type(error).__name__}); expected {', '.join(FORMATS)}."
        ) from None
    size = f"{plan.width} x {plan.height} pixels"
    if plan.width * plan.height > limits.pixels:
        raise ImageRefusedError(f"the image has {size}; expected at most {limits.pixels} in all.", True)
    if plan.nbytes > limits.decode_bytes:
        raise ImageRefusedError(
            f"the {plan.format} image of {size} would take {plan.nbytes // MIB} MiB to decode; expected at most "
            f"{limits.decode_bytes // MIB} MiB. Send it smaller, or as an ordinary JPEG.",
            True,
        )
    return plan
