"""Images of requests: their data URIs, and the limits that are checked before any pixel is decoded."""

from __future__ import annotations

import base64
import binascii
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import PngImagePlugin

from pipeline.data.image_limits import MIB, ImageLimits, ImageRefusedError
from pipeline.data.image_limits import plan_image as accepted
from pipeline.data.smaller_pictures import Decoding
from pipeline.serve.json_body import JsonBody
from pipeline.serve.refusal import RefusedError

PNG_TEXTS = 4 * MIB


class DecodingSpace:
    """A budget of memory for decoding images, shared by the reader threads."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Wait until `size` bytes are free and hold them; more than the limit is held by one thread alone."""
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
    """Limit the decompressed text chunks of a PNG to 4 MiB in this process; Pillow's own limit is 64 MiB."""
    PngImagePlugin.MAX_TEXT_MEMORY = min(PngImagePlugin.MAX_TEXT_MEMORY, PNG_TEXTS)


def read_image(address: str, body: JsonBody) -> bytes:
    """The file bytes in a data URI.

    URLs are never fetched: http would give a caller access to this machine's network, file to its disk.
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
    """Plan how an image is decoded, from its header; RefusedError where it is unreadable or too large.

    Registered MLflow models of earlier versions import this function and `ImageLimits` from here.
    """
    try:
        return accepted(encoded, limits)
    except ImageRefusedError as error:
        raise RefusedError(str(error), 413 if error.too_large else 400) from None
