"""Features of the vision tower for a split's pictures, stored on the disk so that training does not compute them.

A folder beside the split's shards holds `pictures.safetensors` (the picture of each sample), files of features
(float16, each from one forward pass, with a checksum per picture) and, written last, `features.json`.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files.atomic import replacing, write_synced

FORMAT_VERSION = 1
PICTURES = 32  # per file and forward pass, so that computing a file again gives the same bits
DESCRIPTION, NUMBERS = "features.json", "pictures.safetensors"
NO_PICTURE = -1


@dataclass(frozen=True)
class SplitFeatures:
    """The folder of a split's features, and the identity that they must have."""

    folder: Path
    identity: str  # hash of model, preprocessing and precision

    def file(self, number: int) -> Path:
        """The features of pictures number * PICTURES and following."""
        return self.folder / f"features-{number:06d}.safetensors"

    def read_numbers(self, samples: int) -> npt.NDArray[np.int64] | None:
        """The number of the picture of each of the first `samples` samples (NO_PICTURE: none); None if unknown."""
        try:
            with safe_open(self.folder / NUMBERS, framework="np") as file:
                numbers = file.get_tensor("numbers")
                known = (file.metadata() or {}).get("identity") == self.identity and len(numbers) >= samples
        except (OSError, SafetensorError):
            return None
        return numbers[:samples] if known else None

    def write_numbers(self, numbers: npt.NDArray[np.int64]) -> None:
        """Store the number of each sample's picture; pictures are numbered in the order of first appearance."""
        with replacing(self.folder / NUMBERS) as temporary:
            write_synced(temporary, save({"numbers": torch.from_numpy(numbers)}, {"identity": self.identity}))

    def write(self, number: int, features: Tensor) -> None:
        """Store the features [n, tokens, width] of one file; raises UserError for values beyond float16's range."""
        half = features.to("cpu", torch.float16).contiguous()
        if not half.isfinite().all():
            raise UserError(
                f"The vision tower's features reach {float(features.float().abs().max()):.3g}, which float16 cannot "
                "hold. Set train.vision_features to computed."
            )
        tensors = {"features": half, "checksums": torch.tensor([_checksum(row) for row in half])}
        with replacing(self.file(number)) as temporary:
            write_synced(temporary, save(tensors, {"identity": self.identity}))

    def is_whole(self, number: int, pictures: int) -> bool:
        """Whether a file exists with features of at least `pictures` pictures; more where more samples were used."""
        try:
            with safe_open(self.file(number), framework="pt") as file:
                rows = file.get_slice("features").get_shape()[0]
                return rows >= pictures and (file.metadata() or {}).get("identity") == self.identity
        except (OSError, SafetensorError):
            return False

    def describe(self, pictures: int, shape: Sequence[int]) -> None:
        """Write features.json, a description for people."""
        facts: dict[str, Any] = {"format": FORMAT_VERSION, "identity": self.identity, "pictures": pictures}
        facts |= {"tokens": shape[0], "width": shape[1], "dtype": "float16", "pictures_per_file": PICTURES}
        with replacing(self.folder / DESCRIPTION) as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def read(self, picture: int) -> Tensor:
        """The features [tokens, width] of one picture; raises UserError when they are damaged."""
        number, row = divmod(picture, PICTURES)
        try:
            with safe_open(self.file(number), framework="pt") as file:
                features = file.get_slice("features")[row]
                expected = int(file.get_slice("checksums")[row])
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.file(number)} cannot be read ({error}). {self.fix(number)}") from error
        if _checksum(features) != expected:
            raise UserError(f"{self.file(number)} was changed since it was written (its CRC-32). {self.fix(number)}")
        return features

    def fix(self, number: int) -> str:
        """Advice for a damaged file."""
        return f"Remove {self.file(number)} and run the same command again to compute it anew."


class KeptFeatures:
    """Features of the samples of a stage: those of its splits, concatenated."""

    def __init__(self, splits: Sequence[tuple[SplitFeatures, npt.NDArray[np.int64]]], shape: Sequence[int]) -> None:
        self.splits = splits
        self.blank = torch.zeros(1, *shape, dtype=torch.float16)  # for a batch without an image
        self._starts = [0, *accumulate(len(numbers) for _, numbers in splits)]

    def __getitem__(self, index: int) -> Tensor | None:
        """The features [tokens, width] of a sample, None for one without an image."""
        part = bisect_right(self._starts, index) - 1
        split, numbers = self.splits[part]
        picture = int(numbers[index - self._starts[part]])
        return None if picture == NO_PICTURE else split.read(picture)


def number_pictures(digests: Sequence[bytes]) -> npt.NDArray[np.int64]:
    """Number [N] the pictures of samples by the digests of their files; NO_PICTURE for an empty digest.

    The first samples of a split have the same numbers whatever follows, so more samples only add features.
    """
    known: dict[bytes, int] = {}
    numbers = [known.setdefault(digest, len(known)) if digest else NO_PICTURE for digest in digests]
    return np.array(numbers, dtype=np.int64)


def _checksum(features: Tensor) -> int:
    return zlib.crc32(features.contiguous().view(torch.uint8).numpy().data)
