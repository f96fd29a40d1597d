"""The frozen weights of an exported checkpoint: linked files, and copies without the tensors that are replaced."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import UserError
from pipeline.files.atomic import free_space, write_json
from pipeline.hub.weights import INDEX, SINGLE, StoredTensor

BLOCK = 16 << 20  # bytes that are copied at once
FROZEN = "model-frozen.safetensors"  # transformers would take `model.safetensors` for the whole checkpoint
SPARE = 64 << 20  # bytes for small files


@dataclass(frozen=True)
class Frozen:
    """The stored tensors of a checkpoint that stay as they are, by file."""

    whole: list[Path]  # files of which everything stays
    part: dict[Path, list[str]]  # names of the tensors that stay of the others, in the order of the file

    @classmethod
    def of(cls, tensors: Mapping[str, StoredTensor], replaced: set[str]) -> Frozen:
        """What stays without the tensors `replaced`; files of which nothing stays are left out.

        A file with a replaced tensor cannot be used as it is: readers load all that a file holds, whatever the index
        says, and servers refuse a table of another size.
        """
        files = {tensor.file for tensor in tensors.values()}
        touched = {tensors[name].file for name in replaced}
        stays = sorted((name for name in tensors if name not in replaced), key=lambda name: tensors[name].start)
        part = {path: [name for name in stays if tensors[name].file == path] for path in sorted(touched)}
        return cls(sorted(files - touched), {path: names for path, names in part.items() if names})

    def name(self, path: Path) -> str:
        """What the file is called in the new checkpoint."""
        return FROZEN if path.name == SINGLE else path.name


def require_space(target: Path, tensors: Mapping[str, StoredTensor], frozen: Frozen, tables: int, link: bool) -> None:
    """Raise UserError where the disk of `target` has no room for the tables' bytes and all files that are copied."""
    there = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    copied = [p for p in frozen.whole if not link or p.resolve().stat().st_dev != there.stat().st_dev]
    needed = tables + SPARE + sum(path.stat().st_size for path in copied)
    needed += sum(tensors[name].end - tensors[name].start for names in frozen.part.values() for name in names)
    free = free_space(target)
    if free < needed:
        raise UserError(
            f"'{target}' needs {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free there; make room, or "
            "give a folder on the disk of the frozen model, whose files are then linked."
        )


def write_frozen(folder: Path, tensors: Mapping[str, StoredTensor], frozen: Frozen, link: bool) -> int:
    """Put the files of frozen weights into a new checkpoint's folder; returns the bytes that take no further disk.

    A file is linked where `link` is set and the file system can (the link and the original are one file on the disk),
    and copied otherwise.
    """
    linked = 0
    for path in frozen.whole:
        source, target = path.resolve(), folder / frozen.name(path)
        if link and _linked(source, target):
            linked += source.stat().st_size
        else:
            shutil.copyfile(source, target)
            _flush(target)
    for path, names in frozen.part.items():
        _write_part(path, folder / frozen.name(path), {name: tensors[name] for name in names})
    return linked


def write_index(
    folder: Path, tensors: Mapping[str, StoredTensor], frozen: Frozen, added: Mapping[str, tuple[str, int]]
) -> None:
    """Write the index of all tensors: the frozen ones, and the `added` ones by name, with their files and bytes."""
    stays = {name for names in frozen.part.values() for name in names}
    stays |= {name for name, tensor in tensors.items() if tensor.file in frozen.whole}
    files = {name: frozen.name(tensors[name].file) for name in stays} | {
        name: file for name, (file, _) in added.items()
    }
    size = sum(tensors[name].end - tensors[name].start for name in stays) + sum(size for _, size in added.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))})


def _linked(source: Path, target: Path) -> bool:
    """Make a hard link; False where the file system, or its distance, does not allow one."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _write_part(source: Path, target: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write a safetensors file with these tensors of another, block by block."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.end - tensor.start
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the tensors to eight bytes
    with source.open("rb") as file, target.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            file.seek(tensor.start)
            _copy(file, out, tensor.end - tensor.start)
    _flush(target)


def _copy(file: BinaryIO, out: BinaryIO, size: int) -> None:
    while size:
        block = file.read(min(BLOCK, size))
        if not block:
            raise UserError(f"{file.name} ends before its tensors do: it was cut off. Fetch or copy it again.")
        out.write(block)
        size -= len(block)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
