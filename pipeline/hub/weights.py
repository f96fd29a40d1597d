"""The weight files of a checkpoint's folder: which exist, which are missing, and a fingerprint of their tensors.

Only headers of safetensors files and samples of tensors are read; no weights are loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLED_INDEX, PICKLED_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
SCHEME = "tensors-1:"  # prefix of a fingerprint by `tensors_fingerprint`; those of `file_fingerprints` have none
SAMPLE_BYTES = 4096  # of a tensor's beginning, middle and end
EARLIER_SAMPLE_BYTES = 1 << 20  # of a file's beginning and end, in `file_fingerprints`
LONGEST_HEADER = 100 << 20  # bytes; the limit of the safetensors format


@dataclass(frozen=True)
class Weights:
    """Names of the weight files that a folder should have, and of those that are missing."""

    files: list[str]
    missing: list[str]
    pickled: bool = False  # the files are PyTorch's .bin, which are converted before they are loaded

    @property
    def whole(self) -> bool:
        return not self.missing


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place: bytes `start` to `end` of the file; `dtype` by its safetensors name, such as "BF16"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def weights_of(folder: Path) -> Weights:
    """The weight files of a folder: safetensors where there are any, else PyTorch's .bin files.

    A sharded checkpoint lists its files in an index; without an index there is one file.
    """
    for index, single, pickled in ((INDEX, SINGLE, False), (PICKLED_INDEX, PICKLED_SINGLE, True)):
        if (folder / index).is_file():
            names = _indexed(folder / index)
            if names is None:
                return Weights([], [f"{index} (damaged)"], pickled)
            missing = [name for name in names if not (folder / name).is_file()]
            if pickled or len(missing) < len(names) or not any(folder.glob("pytorch_model*.bin")):
                return Weights(names, missing, pickled)
        elif (folder / single).is_file():
            return Weights([single], [], pickled)
    return Weights([SINGLE], [SINGLE])


def _indexed(index: Path) -> list[str] | None:
    try:
        return sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def tensors_of(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a folder's safetensors files by its name.

    Raises UserError when a file is missing, truncated or no safetensors file, or lacks a tensor that the index lists.
    """
    weights = weights_of(folder)
    if weights.missing or weights.pickled:
        raise UserError(lacking(folder, weights.missing or [SINGLE]))
    found: dict[str, StoredTensor] = {}
    for name in weights.files:
        found |= _header(folder / name)
    if (folder / INDEX).is_file():
        named = set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"])
        gone = sorted(named - found.keys())
        if gone:
            raise UserError(
                f"The weight files in {folder} have not {len(gone)} of the tensors that {INDEX} names, for example "
                f"{gone[0]}; index and files are not of the same checkpoint. Fetch or copy them again."
            )
    return found


def lacking(folder: Path, missing: list[str]) -> str:
    """The error message for a folder that lacks some of its weight files."""
    listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return f"The checkpoint in {folder} lacks weights ({listed}). Fetch or copy them there; nothing is loaded in part."


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(LONGEST_HEADER, size):
                raise ValueError("its header would be longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        first = 8 + length
        found = {
            name: StoredTensor(
                path,
                entry["dtype"],
                tuple(entry["shape"]),
                first + entry["data_offsets"][0],
                first + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}). Fetch or copy it again.") from error
    expected = max((tensor.end for tensor in found.values()), default=first)
    if size != expected:
        raise UserError(
            f"{path} has {size} bytes and its header describes {expected}: it was cut off or damaged. Fetch or copy it "
            "again."
        )
    return found


def tensors_fingerprint(folder: Path) -> str:
    """Hash of a model: its config.json, and the name, type, shape and samples of every tensor.

    Samples are the first, middle and last SAMPLE_BYTES of a tensor. They suffice because training, merging an update
    and quantising change a tensor everywhere, and they are a few megabytes of a 7B model's 14 gigabytes. The hash does
    not depend on how tensors are distributed over files. Raises UserError where weights are missing or damaged.
    """
    digest = hashlib.sha256(_settings(folder))
    files: dict[Path, int] = {}
    try:
        for name, tensor in sorted(tensors_of(folder).items()):
            if tensor.file not in files:
                files[tensor.file] = os.open(tensor.file, os.O_RDONLY)
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            for start, length in _samples(tensor):
                digest.update(os.pread(files[tensor.file], length, start))
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    return SCHEME + digest.hexdigest()


def _samples(tensor: StoredTensor) -> list[tuple[int, int]]:
    """(offset, length) in bytes of the samples of a tensor; a small tensor is one sample."""
    size = tensor.end - tensor.start
    if size <= 3 * SAMPLE_BYTES:
        return [(tensor.start, size)]
    middle = tensor.start + size // 2
    return [(start, SAMPLE_BYTES) for start in (tensor.start, middle, tensor.end - SAMPLE_BYTES)]


def file_fingerprints(folder: Path) -> list[str]:
    """The fingerprints that runs made before `tensors_fingerprint` existed may have recorded for this folder.

    They covered config.json and the first and last MiB of each safetensors file. The last one covers no weights: it
    was recorded where these were fetched later or were .bin files.
    """
    exact = {name for name in weights_of(folder).files if name.endswith(".safetensors")}
    every = {path.name for path in folder.glob("*.safetensors")}
    return [_file_fingerprint(folder, sorted(names)) for names in (exact & every, every, set[str]())]


def _file_fingerprint(folder: Path, names: list[str]) -> str:
    digest = hashlib.sha256(_settings(folder))
    for name in names:
        size = (folder / name).stat().st_size
        digest.update(f"{name}:{size}".encode())
        with (folder / name).open("rb") as file:
            digest.update(file.read(EARLIER_SAMPLE_BYTES))
            file.seek(max(0, size - EARLIER_SAMPLE_BYTES))
            digest.update(file.read(EARLIER_SAMPLE_BYTES))
    return digest.hexdigest()


def _settings(folder: Path) -> bytes:
    try:
        settings = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no readable config.json ({error}); expected a checkpoint.") from error
    for name in ("transformers_version", "_name_or_path"):
        settings.pop(name, None)
    return json.dumps(settings, sort_keys=True).encode()
