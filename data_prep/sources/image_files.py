"""Reads image files that records name, and explains why a named file does not exist."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import UnidentifiedImageError

from pipeline.data.pictures import decode_image, is_heic
from pipeline.errors import PipelineError

# With those of HEIC, which cannot be decoded, so that such files lead to an error instead of being left out silently.
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".heic", ".heif")
)
_LONGEST_NAME = 255  # bytes of one part of a path on the usual file systems
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class UnreadableError(PipelineError):
    """An image file cannot be used; the message is a clause that follows the file's name."""


def read_image(path: Path) -> bytes:
    """Return the bytes of an image file after decoding it as a check; raises UnreadableError with the reason."""
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise UnreadableError(f"cannot be read ({error.strerror or error}). Restore the file.") from error
    check_image(encoded)
    return encoded


def check_image(encoded: bytes) -> None:
    """Decode the bytes of an image file as a check; raises UnreadableError with the reason."""
    try:
        decode_image(encoded)
    except Exception as error:  # PIL raises a dozen types of errors for damaged files
        found = str(error) if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
        advice = "Save it as JPEG." if is_heic(encoded) else "Fetch the file again."
        raise UnreadableError(f"cannot be decoded ({found}). {advice}") from error


def why_missing(folders: Sequence[Path], image: str) -> str | None:
    """Return a clause that says why `image` is no file below any of these folders; None where the reason is unknown.

    Recognised are URLs, impossible names, folders, and a file whose name differs only in capitals, accents, slashes or
    blanks.
    """
    if _ADDRESS.match(image):
        return "is an address; images are not fetched. Download it and give its path."
    if "\0" in image or any(len(part.encode("utf-8", "replace")) > _LONGEST_NAME for part in Path(image).parts):
        return "has a name that no file can have. Correct the path."
    if any((folder / image).is_dir() for folder in folders):
        return "is a folder, expected one image file. Name the file."
    for folder in folders:
        similar = _similar(folder, image)
        if similar is not None:
            # In ASCII (!a), because the composed and the decomposed form of an accented letter look the same.
            return f"does not exist, but {similar!a} does: capitals, accents, slashes, blanks count. Correct the path."
    return None


def _similar(folder: Path, image: str) -> str | None:
    """The path of a file below `folder` that differs from `image` only in spelling; None without one."""
    parts = [part for part in image.strip().replace("\\", "/").split("/") if part not in ("", ".")]
    found = Path()
    for part in parts:
        names = _names(str(folder / found))
        name = part if part in names.values() else names.get(_plain(part))
        if name is None:
            return None
        found /= name
    return found.as_posix() if parts and (folder / found).is_file() else None


@lru_cache(maxsize=64)
def _names(folder: str) -> dict[str, str]:
    """The names in a folder by their plain spelling; cached, as a wrong root causes thousands of look-ups."""
    try:
        return {_plain(path.name): path.name for path in Path(folder).iterdir()}
    except OSError:
        return {}


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().strip()
