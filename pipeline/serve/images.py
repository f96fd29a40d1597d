"""Images of requests: what their data URIs hold, and whether they may be decoded, before any pixel is."""

from __future__ import annotations

import base64
import binascii
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, PngImagePlugin

from pipeline.data.smaller_pictures import FORMATS, Decoding, plan_decoding
from pipeline.serve.json_body import JsonBody
from pipeline.serve.refusal import RefusedError

MIB = 1 << 20
WORK_SIDE = 2048
WORK_PIXELS = WORK_SIDE**2  # larger images are made smaller before models' processors, which copy them several times
DECODE_BYTES = 10  # per pixel of the largest image that is accepted: 160 MiB for 4096 x 4096
PNG_TEXTS = 4 * MIB


@dataclass(frozen=True)
class ImageLimits:
    """Which images are accepted; `side` is the longest side for models whose images are padded to squares."""

    pixels: int = 4096 * 4096
    side: int | None = None

    @property
    def decode_bytes(self) -> int:
        """Bytes that one image, or several that are read at once, may take while they are decoded."""
        return max(DECODE_BYTES * self.pixels, 128 * MIB)


class DecodingSpace:
    """The memory in which images are decoded, shared by the threads that do."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Wait until so many bytes are free and hold them; one that is larger than all of it waits to be alone."""
        size = min(size, self.limit)
        with self._changed:
            self._changed.wait_for(lambda: self.held + size <= self.limit)
            self.held += size
        try:
            yield
        finally:
            with self._changed:
                self.held -= size
                self._changed.notify_all()


def bound_png_texts() -> None:
    """Let this process unpack 4 MiB of a PNG's compressed texts, of which Pillow's own limit is 64 MiB."""
    PngImagePlugin.MAX_TEXT_MEMORY = min(PngImagePlugin.MAX_TEXT_MEMORY, PNG_TEXTS)


def read_image(address: str, body: JsonBody) -> bytes:
    """The file bytes in a data URI.

    Nothing is ever fetched: an http address would let a caller look into this machine's network, a file address into
    its disk.
    """
    if not body.beginning(address, 5) == "data:":
        raise RefusedError(
            f"the image's url begins with '{body.beginning(address)}'; expected a data URI, "
            "data:image/png;base64,... (addresses are not fetched)."
        )
    try:
        written = body.ascii_bytes(address)
        head, comma, data = written.partition(b",")
        if not comma or not head.endswith(b";base64"):
            raise RefusedError("the image's data URI is not base64; expected data:image/png;base64,...")
        del written
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedError(f"the image's data URI is not base64 ({error}); encode the file's bytes.") from None


def plan_image(encoded: bytes, limits: ImageLimits) -> Decoding:
    """How an image will be decoded, known from its header; refused where it is none or too large."""
    try:
        plan = plan_decoding(encoded, WORK_PIXELS, limits.side)
    except Image.DecompressionBombError:
        raise RefusedError(f"the image is huge; expected at most {limits.pixels} pixels.", 413) from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise RefusedError(
            f"the image is not readable ({type(error).__name__}); expected {', '.join(FORMATS)}."
        ) from None
    size = f"{plan.width} x {plan.height} pixels"
    if plan.width * plan.height > limits.pixels:
        raise RefusedError(f"the image has {size}; expected at most {limits.pixels} in all.", 413)
    if plan.nbytes > limits.decode_bytes:
        raise RefusedError(
            f"the {plan.format} image of {size} would take {plan.nbytes // MIB} MiB to decode; expected at most "
            f"{limits.decode_bytes // MIB} MiB. Send it smaller, or as an ordinary JPEG.",
            413,
        )
    return plan
