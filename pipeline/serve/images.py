"""Images of requests: what their data URIs hold, and whether they may be decoded, before any pixel is."""

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
    """How an image will be decoded, known from its header; RefusedError where it is none or too large.

    Registered MLflow models of earlier versions import it, and `ImageLimits`, from here.
    """
    try:
        return accepted(encoded, limits)
    except ImageRefusedError as error:
        raise RefusedError(str(error), 413 if error.too_large else 400) from None
