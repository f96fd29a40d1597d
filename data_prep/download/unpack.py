"""Unpacks zip archives into a folder: each file whole or not at all, and files that are there already are kept."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath

from pipeline.errors import UserError


def unpacked_size(archive: Path) -> int:
    """Bytes of what an archive holds; UserError for a file that is no zip archive."""
    with _opened(archive) as found:
        return sum(member.file_size for member in found.infolist())


def unpack(archive: Path, folder: Path) -> int:
    """Unpack an archive below `folder` and return the number of its files.

    Raises UserError for a damaged archive, and for one with paths outside of the folder or links.
    """
    count = 0
    with _opened(archive) as found:
        members = [member for member in found.infolist() if not member.is_dir()]
        for member in members:
            path = PurePosixPath(member.filename)
            if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
                raise UserError(f"{archive} holds '{member.filename}', a link or a path outside; unpack it by hand.")
        for member in members:
            target = folder / member.filename
            count += 1
            if target.is_file() and target.stat().st_size == member.file_size:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f"{target.name}.part")
            try:
                with found.open(member) as source, temporary.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
            except (zipfile.BadZipFile, EOFError) as error:
                temporary.unlink(missing_ok=True)
                raise UserError(
                    f"{archive} is damaged at '{member.filename}' ({error}); remove it and repeat the command."
                ) from None
            os.replace(temporary, target)
    return count


def _opened(archive: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive} is no zip archive ({error}); remove it and repeat the command.") from None
