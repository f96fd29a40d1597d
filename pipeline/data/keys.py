"""The routing keys of prepared splits: float16 matrices that are memory-mapped from the disk.

The kernel holds the pages of the file, so ranks of one machine share them, and unused pages take no memory. Rows are
converted to float32 where they are used in computations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.data.key_file import FINGERPRINT, FIX, IDENTITY_FIELDS, KEYS_FILE, first_line
from pipeline.errors import UserError


class ChainedRows:
    """The concatenated rows [N, K] of several tensors, without a copy."""

    def __init__(self, parts: Sequence[Tensor | PickedRows]) -> None:
        self._parts = list(parts)
        self._starts = torch.tensor([0, *accumulate(len(part) for part in parts)])
        self.shape = torch.Size([int(self._starts[-1]), *parts[0].shape[1:]])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        """The rows [B, K] at the indices [B]."""
        found = self._parts[0].new_empty((len(index), *self.shape[1:]))
        owners = torch.searchsorted(self._starts, index, right=True) - 1
        for number in owners.unique().tolist():
            mine = owners == number
            found[mine] = self._parts[number][index[mine] - self._starts[number]]
        return found

    def split(self, rows: int) -> Iterator[Tensor]:
        """All rows in turn, `rows` at a time (fewer at the end), as `Tensor.split` cuts them."""
        for start in range(0, len(self), rows):
            pieces = [
                part[max(start - first, 0) : start + rows - first]
                for part, first in zip(self._parts, self._starts.tolist(), strict=False)
                if first < start + rows and first + len(part) > start
            ]
            yield pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class PickedRows:
    """Some rows [N, K] of a tensor, without a copy."""

    def __init__(self, source: Tensor, rows: Tensor) -> None:
        """`rows` [N] are their indices in `source`."""
        self._source, self._rows = source, rows
        self.shape = torch.Size([len(rows), *source.shape[1:]])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """The rows [B, K] at the indices [B] among these rows."""
        return self._source[self._rows[index]]

    def only(self, rows: Tensor) -> PickedRows:
        """Some of these rows."""
        return PickedRows(self._source, self._rows[rows])

    def new_empty(self, shape: Sequence[int]) -> Tensor:
        """An empty tensor of the same type, see `Tensor.new_empty`."""
        return self._source.new_empty(tuple(shape))

    def split(self, rows: int) -> Iterator[Tensor]:
        """All rows in turn, `rows` at a time (fewer at the end), as `Tensor.split` cuts them."""
        return (self[start : start + rows] for start in range(0, len(self), rows))


Rows = Tensor | ChainedRows | PickedRows


@dataclass(frozen=True)
class Keys:
    """CLIP keys of samples in their order, not normalised; rows of `image` without an image are zero.

    Those of a prepared split are float16 and memory-mapped, those computed in memory float32.
    """

    image: Tensor  # [N, K]
    text: Tensor  # [N, K]
    has_image: Tensor  # [N] bool
    identity: dict[str, str]

    def only(self, rows: npt.NDArray[np.int64]) -> PickedKeys:
        """The keys of some samples."""
        picked = torch.from_numpy(rows)
        return PickedKeys(
            PickedRows(self.image, picked), PickedRows(self.text, picked), self.has_image[picked], self.identity
        )


@dataclass(frozen=True)
class PickedKeys:
    """`Keys` of some of a split's samples."""

    image: PickedRows  # [N, K]
    text: PickedRows  # [N, K]
    has_image: Tensor  # [N] bool
    identity: dict[str, str]

    def only(self, rows: npt.NDArray[np.int64]) -> PickedKeys:
        """The keys of some of these samples."""
        picked = torch.from_numpy(rows)
        return PickedKeys(self.image.only(picked), self.text.only(picked), self.has_image[picked], self.identity)


@dataclass(frozen=True)
class JoinedKeys:
    """`Keys` of several splits, concatenated."""

    image: ChainedRows  # [N, K]
    text: ChainedRows  # [N, K]
    has_image: Tensor  # [N] bool
    identity: dict[str, str]


AnyKeys = Keys | PickedKeys | JoinedKeys


def join_keys(parts: Sequence[tuple[Keys | PickedKeys, int]]) -> AnyKeys:
    """The concatenated keys of the first `count` samples of each part, without a copy."""
    first, count = parts[0]
    if len(parts) == 1 and isinstance(first, PickedKeys) and count == len(first.image):
        return first
    images, texts = [_first(keys.image, count) for keys, count in parts], [_first(keys.text, n) for keys, n in parts]
    flags = torch.cat([keys.has_image[:count] for keys, count in parts]).bool()
    identity = dict(first.identity)
    if len(parts) == 1 and isinstance(images[0], Tensor) and isinstance(texts[0], Tensor):
        return Keys(images[0], texts[0], flags, identity)
    return JoinedKeys(ChainedRows(images), ChainedRows(texts), flags, identity)


def in_parts(keys: AnyKeys, rows: int) -> Iterator[Keys]:
    """All keys in turn, those of `rows` samples at a time (fewer at the end)."""
    parts = (part.split(rows) for part in (keys.image, keys.text, keys.has_image))
    return (Keys(image, text, has_image, keys.identity) for image, text, has_image in zip(*parts, strict=True))


def _first(rows: Tensor | PickedRows, count: int) -> Tensor | PickedRows:
    return rows if count == len(rows) else rows[:count]


def read_keys(folder: Path, description: Mapping[str, Any], expected_identity: Mapping[str, str] | None = None) -> Keys:
    """Memory-map keys.safetensors of a prepared split without its checksum; see `IndexedShards.keys` for errors."""
    path = folder / KEYS_FILE
    if not path.is_file():
        raise UserError(f"The CLIP keys {path} are missing. Run `python -m pipeline prepare RECIPE` to compute them.")
    try:
        with safe_open(path, framework="pt") as file:
            identity = dict(file.metadata() or {})
            # Views into the mapped file; pages are read when they are first used.
            image, text, has_image = (file.get_tensor(name) for name in ("image", "text", "has_image"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"The CLIP keys {path} cannot be read ({first_line(error)}). {FIX}") from None
    if identity.get(FINGERPRINT) != description["fingerprint"]:
        raise UserError(f"The CLIP keys {path} were computed for another dataset. {FIX}")
    count = description["count"]
    if image.shape != text.shape or len(image) != count or has_image.shape != (count,):
        raise UserError(
            f"The CLIP keys {path} have shapes image {list(image.shape)}, text {list(text.shape)}, has_image "
            f"{list(has_image.shape)}; expected {count} rows of one width. {FIX}"
        )
    cut = identity.get("text_truncation", "head")
    wanted = (expected_identity or identity).get("text_truncation", "head")
    if cut != wanted:
        raise UserError(
            f"The CLIP keys {path} keep the {cut} of long questions, keys.text_truncation says {wanted}. "
            "Run `python -m pipeline prepare RECIPE` to compute them anew."
        )
    for name in IDENTITY_FIELDS:
        if expected_identity is not None and identity.get(name) != expected_identity[name]:
            raise UserError(
                f"The CLIP keys {path} come from another CLIP: {name} is {identity.get(name)} "
                f"(model {identity.get('clip')}), the recipe's model {expected_identity.get('clip')} has "
                f"{expected_identity[name]}. Set data.prepared to another folder and run `python -m pipeline prepare "
                "RECIPE`, or run it with `--replace` to compute them anew here, where other recipes and runs may need "
                "them."
            )
    return Keys(image, text, has_image.bool(), identity)
