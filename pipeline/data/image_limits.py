"""Which images of callers who are not trusted may be decoded: known from their headers, before any pixel is read."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from pipeline.data.smaller_pictures import FORMATS, Decoding, plan_decoding
from pipeline.errors import UserError

MIB = 1 << 20
WORK_SIDE = 2048
WORK_PIXELS = WORK_SIDE**2  # larger images are made smaller before models' processors, which copy them several times
DECODE_BYTES = 10  # per pixel of the largest image that is accepted: 160 MiB for 4096 x 4096


@dataclass(frozen=True)
class ImageLimits:
    """Which images are accepted; `side` is the longest side for models whose images are padded to squares."""

    pixels: int = 4096 * 4096
    side: int | None = None

    @property
    def decode_bytes(self) -> int:
        """Bytes that one image, or several that are read at once, may take while they are decoded."""
        return max(DECODE_BYTES * self.pixels, 128 * MIB)


class ImageRefusedError(UserError):
    """An image is not decoded: it is none, or `too_large`."""

    def __init__(self, message: str, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


def plan_image(encoded: bytes, limits: ImageLimits) -> Decoding:
    """How an image will be decoded, known from its header; ImageRefusedError where it is none or too large."""
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
