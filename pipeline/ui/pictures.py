"""Pictures of test samples from the prepared data, and pictures that a person sends."""

from __future__ import annotations

import io
import secrets
import threading
from collections import OrderedDict
from pathlib import Path

from pipeline.data.image_limits import ImageLimits, plan_image
from pipeline.data.sample import Sample
from pipeline.data.shards import DATASET_FILE, IndexedShards
from pipeline.data.smaller_pictures import decode_smaller
from pipeline.errors import UserError
from pipeline.runs.folder import RunFolder
from pipeline.ui.web import PageError

LIMITS = ImageLimits()
SMALL, LARGE = 320, 2048  # pixels of the longer side, beside an example and by itself
MOST_BYTES = 8 << 20  # of a picture that is sent
KEPT_PICTURES, KEPT_SPLITS = 32, 64


class Samples:
    """Test samples of prepared data, whose splits stay open; data that is not on this machine has none."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[str, str, int], IndexedShards | None] = OrderedDict()
        self._guard = threading.Lock()

    def sample(self, run: RunFolder, task: str, row: int, identity: str) -> Sample | None:
        """The sample with this id, which is looked for at its place among the predictions first."""
        split = self.split(run, task)
        if split is None:
            return None
        try:
            if not (row < len(split) and split.ids[row] == identity):
                row = next((place for place, name in enumerate(split.ids) if name == identity), -1)
            return split[row] if row >= 0 else None
        except (UserError, OSError):
            return None

    def split(self, run: RunFolder, task: str) -> IndexedShards | None:
        """The test split of a task; None where it is not on this machine."""
        prepared = run.config.get("data", {}).get("prepared")
        if not prepared or task not in run.tasks:
            return None
        folder = Path(prepared) / task / "test"
        try:
            # A task's name is one part of a path; a run folder from elsewhere could have another.
            if folder.resolve().parent.parent != Path(prepared).resolve():
                return None
            key = (str(run.path), task, (folder / DATASET_FILE).stat().st_mtime_ns)
        except OSError:
            return None
        with self._guard:
            if key not in self._open:
                self._open[key] = _opened(folder)
                while len(self._open) > KEPT_SPLITS:
                    self._open.popitem(last=False)
            self._open.move_to_end(key)
            return self._open[key]


def _opened(folder: Path) -> IndexedShards | None:
    try:
        return IndexedShards(folder)
    except (UserError, OSError):
        return None


def file_for_browser(encoded: bytes, side: int) -> tuple[bytes, str]:
    """A picture file as PNG or JPEG with sides of at most `side`, and its media type; PageError for an unreadable one.

    It is decoded and written anew, so that a browser gets no other file format than these two.
    """
    try:
        picture = decode_smaller(encoded, plan_image(encoded, LIMITS))
    except Exception as error:  # Pillow raises many kinds for damaged files
        message = str(error) if isinstance(error, UserError) else f"the image is not readable ({type(error).__name__})."
        raise PageError(message, 413 if getattr(error, "too_large", False) else 415) from None
    picture.thumbnail((side, side))
    kind = "PNG" if picture.width * picture.height <= 256 * 256 else "JPEG"
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue(), f"image/{kind.lower()}"


class SentPictures:
    """The pictures that a person has sent, in memory; the oldest are forgotten."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._guard = threading.Lock()

    def add(self, encoded: bytes) -> str:
        """Keep a picture and return its name; PageError for one that is unreadable or too large."""
        file_for_browser(encoded, SMALL)
        name = secrets.token_urlsafe(9)
        with self._guard:
            self._kept[name] = encoded
            while len(self._kept) > KEPT_PICTURES:
                self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> bytes:
        """The picture of that name; PageError where it is forgotten."""
        with self._guard:
            found = self._kept.get(name)
        if found is None:
            raise PageError("This picture is not kept any more; choose it again.")
        return found
