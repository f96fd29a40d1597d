"""downloads.json: size and hash of every file that was fetched, with which later downloads are compared.

Where a source states no hash, the first download is trusted and its hash is recorded; another content under the same
address is refused from then on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import UserError
from pipeline.files.atomic import write_json

RECORD = "downloads.json"


class Entry(BaseModel):
    """A file that was fetched; `path` is relative to the root."""

    model_config = ConfigDict(extra="forbid")

    path: str
    size: int
    sha256: str
    unpacked: int | None = None  # files that came out of it


@dataclass
class Record:
    """The entries of a root's downloads.json by address."""

    path: Path
    entries: dict[str, Entry]

    @classmethod
    def of(cls, root: Path) -> Record:
        """Read the record of a root, empty where there is none; UserError for a damaged one."""
        path = root / RECORD
        if not path.is_file():
            return cls(path, {})
        try:
            content = json.loads(path.read_text("utf-8"))
            return cls(path, {url: Entry.model_validate(fields) for url, fields in content.items()})
        except (OSError, ValueError, AttributeError, ValidationError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{path} cannot be read ({first}); restore it, or remove it to trust new files.") from None

    def add(self, url: str, entry: Entry) -> None:
        """Add or replace an entry and write the file."""
        self.entries[url] = entry
        write_json(self.path, {known: found.model_dump() for known, found in sorted(self.entries.items())})
